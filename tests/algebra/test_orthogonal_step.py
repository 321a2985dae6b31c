"""Steps of equal size in all directions."""

from __future__ import annotations

import pytest
import torch

from moe_svd_distill.algebra.orthogonal_step import adam_like_size, near_polar_factor


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 9, 9)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = near_polar_factor(matrices)
    turned = left.transpose(1, 2) @ found @ right.transpose(1, 2)
    sizes = turned.diagonal(dim1=1, dim2=2)
    assert float((turned - torch.diag_embed(sizes)).abs().max()) < 1e-9
    large = values > 0.1 * values.amax(dim=1, keepdim=True)
    assert float(sizes[large].min()) > 0.6
    assert float(sizes.max()) < 1.25


def test_the_scale_of_a_matrix_does_not_matter_and_zero_stays_zero() -> None:
    matrices = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(near_polar_factor(1e-4 * matrices), near_polar_factor(matrices), rtol=1e-3, atol=1e-4)
    assert not near_polar_factor(torch.zeros(1, 4, 6)).any()


def test_entries_are_as_large_as_those_of_a_step_of_adamw() -> None:
    step = near_polar_factor(torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(2)))
    size = adam_like_size(64, 256) * float(step.square().mean().sqrt())
    assert 0.1 < size < 0.3


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8)])
def test_the_way_over_the_gram_matrix_is_the_plain_iteration(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    matrices = left @ torch.diag_embed(values * torch.logspace(0, -6, values.shape[1])) @ right
    wide = matrices if shape[1] <= shape[2] else matrices.transpose(1, 2)
    plain = wide / wide.norm(dim=(1, 2), keepdim=True)
    for _ in range(4):
        square = plain @ plain.transpose(1, 2)
        plain = 3.4445 * plain + (-4.7750 * square + 2.0315 * square @ square) @ plain
    expected = plain if shape[1] <= shape[2] else plain.transpose(1, 2)
    torch.testing.assert_close(near_polar_factor(matrices), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(near_polar_factor(matrices.float()).double(), expected, rtol=0, atol=1e-4)
