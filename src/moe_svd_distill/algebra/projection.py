"""Bringing a teacher's matrix into the shape of a student's.

Either without any knowledge of what its rows mean, or by a linear map from the teacher's residual stream to the
student's, found from words both vocabularies share.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moe_svd_distill.algebra.interpolation import working
from moe_svd_distill.algebra.subspace import row_gram


class ProjectionError(ArithmeticError):
    """The eigenvectors of a matrix could not be found; the caller may fall back on another projection."""


def svd_projection(matrix: Float[Tensor, "m n"], shape: tuple[int, int]) -> Float[Tensor, "p q"]:
    """The first generation's projection: centre, truncate the SVD to rank k, cut the top-left block, add the mean back.

    ``k`` is the least of the four dimensions. With ``P`` the projector on the k leading singular vectors of the smaller
    side of ``X = D - mean(D)`` the result is ``(P X)[:p, :q] + mean(D)``, so eigenvectors of the smaller Gram matrix
    suffice and only the block is ever computed. Division by the standard deviation, which the description asks for,
    cancels. Where the target is larger, the mean is filled in. If k is no less than min(m, n) nothing is truncated: the
    result is the block itself.

    Raises:
        ProjectionError: an entry that is not finite, or no convergence of the eigenvalue solver.
        ValueError: a dimension below 1.
    """
    _check_shape(shape)
    X = working(matrix)
    mean = X.mean(dim=(-2, -1), keepdim=True)
    if not bool(torch.isfinite(mean)):
        raise ProjectionError("matrix has an entry that is not finite")
    m, n = matrix.shape
    rows, columns = min(m, shape[0]), min(n, shape[1])
    rank = min(m, n, *shape)
    truncated = rank < min(m, n)
    block = _truncated_block(X - mean, rank, rows, columns) + mean if truncated else X[:rows, :columns]
    if (rows, columns) == shape:
        return block.contiguous()
    projected = mean.expand(*shape).clone()
    projected[:rows, :columns] = block
    return projected


def fourier_projection(matrix: Float[Tensor, "m n"], shape: tuple[int, int]) -> Float[Tensor, "p q"]:
    """Crop (or zero-pad) the 2-D real FFT spectrum to the target's, invert, and restore mean and standard deviation.

    The low frequencies of both signs are kept, so the result is the matrix resampled as if it were a picture. A matrix
    of the target's shape comes back unchanged.

    Raises:
        ProjectionError: an entry that is not finite.
        ValueError: a dimension below 1.
    """
    _check_shape(shape)
    X = working(matrix)
    mean = X.mean()
    if not bool(torch.isfinite(mean)):
        raise ProjectionError("matrix has an entry that is not finite")
    if tuple(matrix.shape) == shape:
        return X
    m, n = matrix.shape
    spectrum = torch.fft.rfft2(X - mean, norm="forward")
    p, q = shape
    columns = min(n, q) // 2 + 1
    target = spectrum.new_zeros(p, q // 2 + 1)
    low, high = (min(m, p) + 1) // 2, min(m, p) // 2
    target[:low, :columns] = spectrum[:low, :columns]
    target[p - high :, :columns] = spectrum[m - high :, :columns]
    resampled = torch.fft.irfft2(target, s=shape, norm="forward")
    resampled = resampled - resampled.mean()
    spread = resampled.std(correction=0)
    factor = X.std(correction=0) / spread if float(spread) > 0.0 else 0.0
    return resampled * factor + mean


def slice_projection(matrix: Float[Tensor, "m n"], shape: tuple[int, int]) -> Float[Tensor, "p q"]:
    """The top-left block; zeros where the target is larger.

    Raises:
        ValueError: a dimension below 1.
    """
    _check_shape(shape)
    sliced = matrix.new_zeros(shape)
    rows, columns = min(matrix.shape[0], shape[0]), min(matrix.shape[1], shape[1])
    sliced[:rows, :columns] = matrix[:rows, :columns]
    return working(sliced)


def _truncated_block(centred: Float[Tensor, "m n"], rank: int, rows: int, columns: int) -> Float[Tensor, "p q"]:
    """``(P X)[:rows, :columns]`` with P the projector on the ``rank`` leading singular vectors of the smaller side."""
    if centred.shape[0] > centred.shape[1]:
        return _truncated_block(centred.mT, rank, columns, rows).mT
    small = centred.shape[0]
    try:
        vectors = torch.linalg.eigh(row_gram(centred))[1]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ProjectionError(str(error)) from error
    right = centred[:, :columns]
    if 2 * rank <= small:
        kept = vectors[:, small - rank :]
        return kept[:rows] @ (kept.mT @ right)
    dropped = vectors[:, : small - rank]
    return right[:rows] - dropped[:rows] @ (dropped.mT @ right)


def _check_shape(shape: tuple[int, int]) -> None:
    if min(shape) < 1:
        raise ValueError(f"target shape must be at least 1 x 1, not {shape}")


def vocabulary_procrustes(
    teacher_rows: Float[Tensor, "v h_t"], student_rows: Float[Tensor, "v h_s"]
) -> Float[Tensor, "h_s h_t"]:
    """Semi-orthogonal ``R`` that maximises ``tr(R T^T S)`` over shared vocabulary rows (orthogonal Procrustes).

    ``student vector ~ scale * R @ teacher vector``: rows orthonormal if h_s <= h_t, columns otherwise.

    Rows are centred; ``R = U V^T`` from the SVD ``S^T T = U Sigma V^T`` (Schoenemann 1966), in float64 from float32
    sums.

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
    U, _, Vh = torch.linalg.svd(cross, full_matrices=False)
    return (U @ Vh).float()


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
