"""The map from one residual stream to the other."""

import pytest
import torch

from moe_svd_distill.algebra.residual_map import apply_residual_map, vocabulary_procrustes


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
    assert float((found.matrix - planted).norm()) < tolerance
    assert found.scale == pytest.approx(0.5, rel=1e-2)
    assert found.explained == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize(("teacher_width", "student_width"), [(24, 16), (16, 24)])
def test_the_map_is_semi_orthogonal_and_optimal(teacher_width: int, student_width: int) -> None:
    teacher, student = random(200, teacher_width), random(200, student_width, seed=1)
    R = vocabulary_procrustes(teacher, student).matrix
    small = min(teacher_width, student_width)
    product = R @ R.T if student_width < teacher_width else R.T @ R
    torch.testing.assert_close(product, torch.eye(small), rtol=0, atol=1e-5)
    cross = (student - student.mean(0)).T @ (teacher - teacher.mean(0))
    best = torch.linalg.svdvals(cross.double()).sum()
    torch.testing.assert_close((R * cross).sum().double(), best, rtol=1e-5, atol=0)


def test_unrelated_rows_are_explained_badly() -> None:
    assert vocabulary_procrustes(random(2000, 32), random(2000, 24, seed=1)).explained < 0.1


def test_unusable_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="two shared"):
        vocabulary_procrustes(random(1, 4), random(1, 3))
    rows = random(9, 4)
    rows[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        vocabulary_procrustes(rows, random(9, 3))


def test_constant_rows_give_a_scale_of_zero() -> None:
    assert vocabulary_procrustes(torch.ones(5, 4), random(5, 3)).scale == 0.0


def test_the_map_is_applied_to_either_side() -> None:
    matrix, left, right = random(2, 6, 8), random(3, 6, seed=1), random(5, 8, seed=2)
    torch.testing.assert_close(apply_residual_map(matrix, left, right), left @ matrix @ right.T)
    torch.testing.assert_close(apply_residual_map(matrix, None, right), matrix @ right.T)
    torch.testing.assert_close(apply_residual_map(matrix[0], left, None), left @ matrix[0])
    assert torch.equal(apply_residual_map(matrix, None, None), matrix)
