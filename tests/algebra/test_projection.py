"""Projections into another shape, against the description done plainly in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_svd_distill.algebra.projection import (
    ProjectionError,
    batched_svd_projection,
    fourier_projection,
    slice_projection,
    svd_projection,
)


def matrix_of(m: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    falling = torch.arange(1, n + 1) ** -0.7
    return torch.randn(m, n, generator=generator) * falling + 0.3


def plain_svd_projection(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """As described: centre, scale, truncate, cut, pad, scale back, add the mean."""
    D = matrix.double()
    mean, deviation = D.mean(), D.std()
    U, S, Vh = torch.linalg.svd((D - mean) / deviation, full_matrices=False)
    rank = min(*D.shape, *shape)
    truncated = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    result = torch.zeros(shape, dtype=torch.float64)
    rows, columns = min(D.shape[0], shape[0]), min(D.shape[1], shape[1])
    result[:rows, :columns] = truncated[:rows, :columns]
    return result * deviation + mean


@settings(max_examples=60, deadline=None)
@given(m=st.integers(2, 24), n=st.integers(2, 24), p=st.integers(1, 30), q=st.integers(1, 30), seed=st.integers(0, 99))
def test_svd_projection_is_the_described_one(m: int, n: int, p: int, q: int, seed: int) -> None:
    matrix = matrix_of(m, n, seed)
    torch.testing.assert_close(
        svd_projection(matrix, (p, q)).double(), plain_svd_projection(matrix, (p, q)), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (20, 150), (150, 20)])
@pytest.mark.parametrize("size", [(128, 64), (64, 128)])
def test_svd_projection_of_larger_matrices(size: tuple[int, int], shape: tuple[int, int]) -> None:
    matrix = matrix_of(*size)
    torch.testing.assert_close(
        svd_projection(matrix, shape).double(), plain_svd_projection(matrix, shape), rtol=0, atol=1e-4
    )


def test_svd_projection_is_the_block_itself_where_nothing_is_truncated() -> None:
    matrix = matrix_of(20, 60)
    torch.testing.assert_close(svd_projection(matrix, (20, 30)), matrix[:, :30], rtol=0, atol=0)


def test_svd_projection_fills_up_with_the_mean() -> None:
    projected = svd_projection(matrix_of(6, 8), (9, 8))
    torch.testing.assert_close(projected[6:], matrix_of(6, 8).mean().expand(3, 8))


def test_batched_svd_projection_is_the_single_one() -> None:
    stack = torch.stack([matrix_of(30, 40, seed) for seed in range(3)])
    for matrix, projected in zip(stack, batched_svd_projection(stack, (16, 50)), strict=True):
        torch.testing.assert_close(projected, svd_projection(matrix, (16, 50)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_reported(value: float) -> None:
    matrix = matrix_of(8, 8)
    matrix[1, 2] = value
    for project in (svd_projection, fourier_projection):
        with pytest.raises(ProjectionError, match="finite"):
            project(matrix, (4, 4))


def test_a_failing_eigenvalue_solver_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(ProjectionError, match="no convergence"):
        svd_projection(matrix_of(8, 8), (4, 4))


def test_fourier_projection_keeps_mean_and_deviation() -> None:
    matrix = matrix_of(64, 48)
    for shape in ((32, 24), (33, 47), (90, 70), (40, 100), (31, 48)):
        projected = fourier_projection(matrix, shape)
        assert tuple(projected.shape) == shape
        torch.testing.assert_close(projected.mean(), matrix.mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(projected.std(correction=0), matrix.std(correction=0), rtol=1e-4, atol=0)


def test_fourier_projection_resamples_a_smooth_picture() -> None:
    def wave(m: int, n: int) -> Tensor:
        rows, columns = torch.arange(m) / m, torch.arange(n) / n
        return torch.sin(2 * torch.pi * (2 * rows[:, None] - 3 * columns)) + 0.5

    torch.testing.assert_close(fourier_projection(wave(40, 60), (20, 33)), wave(20, 33), rtol=0, atol=1e-4)
    torch.testing.assert_close(fourier_projection(wave(20, 33), (41, 60)), wave(41, 60), rtol=0, atol=1e-4)


def test_fourier_projection_changes_nothing_at_the_same_shape() -> None:
    matrix = matrix_of(7, 9)
    torch.testing.assert_close(fourier_projection(matrix, (7, 9)), matrix)


def test_fourier_projection_of_a_constant() -> None:
    torch.testing.assert_close(fourier_projection(torch.full((8, 8), 2.0), (4, 6)), torch.full((4, 6), 2.0))


def test_slice_projection() -> None:
    matrix = matrix_of(4, 6)
    projected = slice_projection(matrix, (6, 3))
    assert torch.equal(projected[:4], matrix[:, :3])
    assert not projected[4:].any()


def test_empty_targets_are_refused() -> None:
    for project in (svd_projection, fourier_projection, slice_projection):
        with pytest.raises(ValueError, match="target shape"):
            project(torch.ones(3, 3), (0, 2))
