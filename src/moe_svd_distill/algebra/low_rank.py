"""Low-rank factors of a matrix: the LoRA pair ``B @ A`` of a weight difference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from moe_svd_distill.algebra.leading import leading_factors
from moe_svd_distill.algebra.subspace import steep_factors

SAFE_NORMS = (1e-6, 1e6)
RESIDUAL_FROM_NORMS = (
    0.003  # below this relative residual Gram matrices and differences of norms have lost their digits
)


@dataclass(frozen=True)
class LowRank:
    """``left @ right``, the best (or nearly best) approximation of a matrix ``D`` at rank ``r``, and how good it is.

    In LoRA's words ``left`` is B and ``right`` is A. Singular values are shared evenly between the two.
    """

    left: Float[Tensor, "m r"]
    right: Float[Tensor, "r n"]
    residual: float  # ||D - left @ right|| / ||D||, Frobenius; 0.0 for a zero matrix
    energy: float  # ||left @ right||^2 / ||D||^2; 1.0 for a zero matrix
    singular_values: Float[Tensor, "r"]  # of the approximation; NaN where no decomposition was needed (method "exact")
    method: str  # "subspace", "gram", "exact" (identity factor, no SVD needed)


def truncated_svd(
    matrix: Float[Tensor, "m n"],
    rank: int,
    *,
    generator: torch.Generator,
    pass_dtype: torch.dtype = torch.float32,
    passes: int | None = None,
) -> LowRank:
    """Factors of ``matrix`` at ``rank``, within 1.001 of the Eckart-Young residual on spectra like those of weights.

    Args:
        matrix: any floating type, (m, n); computed in float32.
        rank: columns of ``left``. At ``rank >= min(m, n)`` the product is exact: one factor is the identity, padded.
        generator: source of the random start; its device need not be the matrix's.
        pass_dtype: number format of the large products (see ``matmul_dtype``).
        passes: number of Krylov blocks; None chooses by rank and shape.

    Raises:
        ValueError: rank below 1, an empty matrix, or an entry that is not finite.
    """
    return _factorise(matrix, rank, generator, pass_dtype, passes)[0]


def batched_truncated_svd(
    matrices: Float[Tensor, "e m n"],
    rank: int,
    *,
    generator: torch.Generator,
    pass_dtype: torch.dtype = torch.float32,
    passes: int | None = None,
) -> list[LowRank]:
    """``truncated_svd`` of every matrix of a stack (the experts of one layer).

    On an accelerator the stack goes through batched kernels; on a CPU one after the other, kinder to its cache.
    """
    if matrices.device.type == "cpu":
        return [_factorise(matrix, rank, generator, pass_dtype, passes)[0] for matrix in matrices]
    return _factorise(matrices, rank, generator, pass_dtype, passes)


def rank_for_energy(singular_values: Float[Tensor, "k"], energy: float, total: float) -> int:
    """Smallest rank whose squared singular values make up ``energy`` (0 to 1) of ``total`` = ||D||^2.

    Returns the number of given values when even all of them do not reach it, and at least 1.

    Raises:
        ValueError: energy outside [0, 1] or a negative total.
    """
    if not 0.0 <= energy <= 1.0:
        raise ValueError(f"energy must lie in [0, 1], not {energy}")
    if total < 0.0:
        raise ValueError(f"total must not be negative, it is {total}")
    captured = singular_values.double().square().cumsum(0)
    reached = int((captured < energy * total * (1.0 - 1e-12)).sum()) + 1
    return max(1, min(reached, singular_values.shape[0]))


def _factorise(
    matrices: Float[Tensor, "*e m n"],
    rank: int,
    generator: torch.Generator,
    pass_dtype: torch.dtype,
    passes: int | None,
) -> list[LowRank]:
    """The factors of every matrix of a stack, or of the one matrix given."""
    stack = matrices if matrices.ndim == 3 else matrices[None]
    norms = _checked_norms(stack, rank)
    m, n = matrices.shape[-2:]
    if rank >= min(m, n):
        return [_identity_factors(matrix, rank) for matrix in stack]
    if not any(norms):
        return [_zero_factors(matrix, rank) for matrix in stack]
    if any(norm and not SAFE_NORMS[0] < norm < SAFE_NORMS[1] for norm in norms):
        return [
            _rescaled(matrix, norm, rank, generator, pass_dtype, passes)
            for matrix, norm in zip(stack, norms, strict=True)
        ]
    D = matrices.float()
    upright = m > n
    energies = torch.tensor(norms if matrices.ndim == 3 else norms[0], dtype=torch.float64, device=D.device).square()
    wide = D.mT if upright else D
    U, W, method = leading_factors(
        wide, rank, energy=energies, generator=generator, pass_dtype=pass_dtype, passes=passes
    )
    if matrices.ndim == 2:
        D, U, W = D[None], U[None], W[None]
    sigma = torch.linalg.vector_norm(W, dim=-1)
    captured = sigma.double().square().sum(-1).tolist()
    energy = [part / norm**2 if norm else 1.0 for part, norm in zip(captured, norms, strict=True)]
    return [
        _finish(D[i], U[i], W[i], sigma[i], norms[i], energy[i], upright, method, generator) for i in range(len(norms))
    ]


def _rescaled(
    matrix: Float[Tensor, "m n"],
    norm: float,
    rank: int,
    generator: torch.Generator,
    pass_dtype: torch.dtype,
    passes: int | None,
) -> LowRank:
    """The factors of a matrix so large or small that squares of its Gram matrix would leave float32."""
    if norm == 0.0:
        return _zero_factors(matrix, rank)
    unit = _factorise(matrix.float() / norm, rank, generator, pass_dtype, passes)[0]
    root = math.sqrt(norm)
    return replace(unit, left=unit.left * root, right=unit.right * root, singular_values=unit.singular_values * norm)


def _finish(
    D: Float[Tensor, "m n"],
    U: Float[Tensor, "r small"],
    W: Float[Tensor, "r large"],
    sigma: Float[Tensor, "r"],
    norm: float,
    energy: float,
    upright: bool,
    method: str,
    generator: torch.Generator,
) -> LowRank:
    """Balance ``U.T @ W`` (rows of U orthonormal, rows of W orthogonal) and measure it."""
    if norm == 0.0:
        return _zero_factors(D, U.shape[0])
    if 1.0 - energy >= RESIDUAL_FROM_NORMS**2:
        left, right = _balance(U, W, sigma, upright)
        return LowRank(left, right, math.sqrt(1.0 - energy), energy, sigma, method)
    U, W = steep_factors(D.mT if upright else D, U.shape[0], generator=generator)
    sigma = torch.linalg.vector_norm(W, dim=1)
    left, right = _balance(U, W, sigma, upright)
    residual = float(torch.linalg.vector_norm(D - left @ right)) / norm
    return LowRank(left, right, residual, 1.0 - residual**2, sigma, method)


def _balance(U: Tensor, W: Tensor, sigma: Tensor, upright: bool) -> tuple[Tensor, Tensor]:
    """``(left, right)`` with the root of each singular value on either side."""
    root = sigma.sqrt()
    inverse = torch.where(root > 0, 1.0 / root, torch.zeros_like(root))
    sign = _signs(W.mT if upright else U.mT)
    short, long = U * (sign * root)[:, None], W * (sign * inverse)[:, None]
    return (long.mT.contiguous(), short) if upright else (short.mT.contiguous(), long)


def _checked_norms(matrices: Float[Tensor, "e m n"], rank: int) -> list[float]:
    """The Frobenius norm of every matrix, having refused what cannot be decomposed."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if matrices[0].numel() == 0:
        raise ValueError(f"matrix of shape {tuple(matrices.shape[1:])} is empty")
    accumulator = torch.promote_types(matrices.dtype, torch.float32)
    rows = torch.linalg.vector_norm(matrices, dim=-1, dtype=accumulator).double()
    norms: list[float] = torch.linalg.vector_norm(rows, dim=-1).tolist()
    if not all(map(math.isfinite, norms)):
        raise ValueError("matrix has an entry that is not finite, or too large for its type")
    return norms


def _identity_factors(matrix: Float[Tensor, "m n"], rank: int) -> LowRank:
    m, n = matrix.shape
    D = matrix.float()
    if n <= m:
        left, right = D, torch.eye(n, device=D.device)
    else:
        left, right = torch.eye(m, device=D.device), D
    unknown = torch.full((rank,), math.nan, device=D.device)
    return LowRank(_pad(left, columns=rank), _pad(right, rows=rank), 0.0, 1.0, unknown, "exact")


def _zero_factors(matrix: Float[Tensor, "m n"], rank: int) -> LowRank:
    m, n = matrix.shape

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=matrix.device)

    return LowRank(zeros(m, rank), zeros(rank, n), 0.0, 1.0, zeros(rank), "exact")


def _signs(left: Tensor) -> Tensor:
    """Signs that make the largest entry of every column positive, so that equal inputs give equal factors."""
    largest = left.gather(0, left.abs().argmax(0, keepdim=True)).squeeze(0)
    return torch.where(largest < 0, -1.0, 1.0).to(left.dtype)


def _pad(matrix: Tensor, *, rows: int | None = None, columns: int | None = None) -> Tensor:
    more_rows = 0 if rows is None else rows - matrix.shape[0]
    more_columns = 0 if columns is None else columns - matrix.shape[1]
    return torch.nn.functional.pad(matrix, (0, more_columns, 0, more_rows)).contiguous()


__all__: Sequence[str] = (
    "LowRank",
    "batched_truncated_svd",
    "rank_for_energy",
    "truncated_svd",
)
