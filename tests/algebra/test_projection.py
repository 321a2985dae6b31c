"""Projections into another shape, against the description done plainly in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_svd_distill.algebra.projection import (
    ProjectionError,
    apply_residual_map,
    fourier_projection,
    slice_projection,
    svd_projection,
    vocabulary_procrustes,
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


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("teacher_width", "student_width", "tolerance"),
    [
        (20, 20, 1e-4),
        (20, 32, 1e-4),
        (32, 20, 0.25),
    ],  # into a narrower stream the optimum is only nearly the planted map
)
def test_a_planted_map_is_found(teacher_width: int, student_width: int, tolerance: float) -> None:
    wide, narrow = max(teacher_width, student_width), min(teacher_width, student_width)
    planted = torch.linalg.qr(random(wide, narrow, seed=1))[0]
    planted = planted if student_width >= teacher_width else planted.T
    teacher = random(4000, teacher_width) + 5.0
    student = 0.5 * teacher @ planted.T - 3.0
    found = vocabulary_procrustes(teacher, student)
    assert float((found - planted).norm()) < tolerance


@pytest.mark.parametrize(("teacher_width", "student_width"), [(24, 16), (16, 24)])
def test_the_map_is_semi_orthogonal_and_optimal(teacher_width: int, student_width: int) -> None:
    teacher, student = random(200, teacher_width), random(200, student_width, seed=1)
    R = vocabulary_procrustes(teacher, student)
    small = min(teacher_width, student_width)
    product = R @ R.T if student_width < teacher_width else R.T @ R
    torch.testing.assert_close(product, torch.eye(small), rtol=0, atol=1e-5)
    cross = (student - student.mean(0)).T @ (teacher - teacher.mean(0))
    best = torch.linalg.svdvals(cross.double()).sum()
    torch.testing.assert_close((R * cross).sum().double(), best, rtol=1e-5, atol=0)


def test_unusable_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="two shared"):
        vocabulary_procrustes(random(1, 4), random(1, 3))
    rows = random(9, 4)
    rows[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        vocabulary_procrustes(rows, random(9, 3))


def test_constant_rows_still_give_a_map() -> None:
    assert bool(torch.isfinite(vocabulary_procrustes(torch.ones(5, 4), random(5, 3))).all())


def test_the_map_is_applied_to_either_side() -> None:
    matrix, left, right = random(2, 6, 8), random(3, 6, seed=1), random(5, 8, seed=2)
    torch.testing.assert_close(apply_residual_map(matrix, left, right), left @ matrix @ right.T)
    torch.testing.assert_close(apply_residual_map(matrix, None, right), matrix @ right.T)
    torch.testing.assert_close(apply_residual_map(matrix[0], left, None), left @ matrix[0])
    assert torch.equal(apply_residual_map(matrix, None, None), matrix)
