"""Synthetic experts."""

import torch

from moe_svd_distill.algebra.blending import blend, frobenius_weights, uniform_weights

MATRICES = (
    torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 5.0])[:, None, None]
)


def test_blend_is_the_weighted_sum() -> None:
    weights = torch.tensor([0.5, 0.2, 0.3])
    expected = 0.5 * MATRICES[0] + 0.2 * MATRICES[1] + 0.3 * MATRICES[2]
    torch.testing.assert_close(blend(MATRICES, weights), expected)


def test_frobenius_weights_are_norms_that_sum_to_one() -> None:
    norms = torch.stack([matrix.norm() for matrix in MATRICES])
    torch.testing.assert_close(frobenius_weights(MATRICES), norms / norms.sum())


def test_zero_matrices_are_weighted_alike() -> None:
    torch.testing.assert_close(frobenius_weights(torch.zeros(4, 2, 2)), torch.full((4,), 0.25))


def test_uniform_weights() -> None:
    torch.testing.assert_close(blend(MATRICES, uniform_weights(MATRICES)), MATRICES.mean(0))


def test_low_precision_is_blended_in_float32() -> None:
    blended = blend(MATRICES.bfloat16(), frobenius_weights(MATRICES.bfloat16()))
    assert blended.dtype == torch.float32
