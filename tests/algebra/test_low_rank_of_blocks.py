"""The factors of a matrix seen in blocks of rows are the best ones."""

from __future__ import annotations

import pytest
import torch

from moe_svd_distill.algebra.low_rank_of_blocks import low_rank_of_blocks
from tests.algebra.plain import plain_truncated_svd


def matrix(rows: int = 200, columns: int = 24) -> torch.Tensor:
    gaussian = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    return gaussian * torch.linspace(1.0, 0.01, columns)


@pytest.mark.parametrize("rank", [1, 5, 23, 24, 30])
def test_it_equals_the_exact_truncation(rank: int) -> None:
    whole = matrix()
    found = low_rank_of_blocks(lambda: whole.split(37), 200, 24, rank)
    expected = plain_truncated_svd(whole, rank)
    assert found.left.shape == (200, rank)
    assert found.right.shape == (rank, 24)
    assert torch.allclose(found.left @ found.right, expected.product.float(), atol=1e-4)
    assert found.residual == pytest.approx(expected.residual, abs=1e-5)
    assert found.norm == pytest.approx(float(torch.linalg.vector_norm(whole)), rel=1e-6)


def test_a_zero_matrix_has_zero_factors() -> None:
    found = low_rank_of_blocks(lambda: [torch.zeros(5, 4)], 5, 4, 2)
    assert (found.norm, found.residual) == (0.0, 0.0)
    assert not found.left.any()


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="rank"):
        low_rank_of_blocks(lambda: [torch.zeros(5, 4)], 5, 4, 0)
