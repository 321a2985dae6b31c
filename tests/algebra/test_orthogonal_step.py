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
