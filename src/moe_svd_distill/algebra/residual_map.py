"""A linear map from the teacher's residual stream to the student's, found from words both vocabularies share."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ResidualMap:
    """``student vector ~ scale * matrix @ teacher vector``."""

    matrix: Float[Tensor, "h_s h_t"]  # semi-orthogonal: rows orthonormal if h_s <= h_t, columns otherwise
    scale: float  # least-squares factor
    explained: float  # share of the student rows' centred energy that the map reproduces, 0 to 1


def vocabulary_procrustes(teacher_rows: Float[Tensor, "v h_t"], student_rows: Float[Tensor, "v h_s"]) -> ResidualMap:
    """Semi-orthogonal ``R`` that maximises ``tr(R T^T S)`` over shared vocabulary rows (orthogonal Procrustes).

    Rows are centred; ``R = U V^T`` from the SVD ``S^T T = U Sigma V^T`` (Schoenemann 1966), in float64 from float32
    sums; ``scale = <S, T R^T> / ||T R^T||^2``.

    Raises:
        ValueError: fewer than two shared rows, or an entry that is not finite.
    """
    if teacher_rows.shape[0] < 2:
        raise ValueError("at least two shared vocabulary rows are needed")
    T = teacher_rows.float() - teacher_rows.float().mean(0)
    S = student_rows.float() - student_rows.float().mean(0)
    cross = (S.mT @ T).double()
    if not bool(torch.isfinite(cross).all()):
        raise ValueError("vocabulary rows have an entry that is not finite")
    U, sigma, Vh = torch.linalg.svd(cross, full_matrices=False)
    R = (U @ Vh).float()
    mapped = float((T @ R.mT).double().square().sum())
    inner = float(sigma.sum())
    student = float(S.double().square().sum())
    return ResidualMap(
        matrix=R,
        scale=inner / mapped if mapped > 0.0 else 0.0,
        explained=min(1.0, inner**2 / (mapped * student)) if mapped > 0.0 and student > 0.0 else 0.0,
    )


def apply_residual_map(
    matrix: Float[Tensor, "*e out in_"],
    left_map: Float[Tensor, "p out"] | None,
    right_map: Float[Tensor, "q in_"] | None,
) -> Float[Tensor, "*e p_or_out q_or_in"]:
    """``left_map @ matrix @ right_map^T``; a side without a map stays as it is.

    ``left_map`` where the rows of the matrix write into the residual stream (o, down), ``right_map`` where its columns
    read from it (q, k, v, gate, up, router, head).
    """
    mapped = matrix.float()
    if left_map is not None:
        mapped = left_map.float() @ mapped
    if right_map is not None:
        mapped = mapped @ right_map.float().mT
    return mapped
