"""Low-rank factors of a matrix, given whole or in blocks of rows: the LoRA pair ``B @ A`` of a weight difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from moe_svd_distill.algebra.leading import leading_factors
from moe_svd_distill.algebra.subspace import steep_factors

SAFE_NORMS = (1e-6, 1e6)
RESIDUAL_FROM_NORMS = 0.003  # below this relative residual Gram matrices and differences of norms lost their digits
_OF_BLOCKS = "gram of blocks"


@dataclass(frozen=True)
class LowRank:
    """``left @ right``, the best (or nearly best) approximation of a matrix ``D`` at rank ``r``, and how good it is.

    In LoRA's words ``left`` is B and ``right`` is A. Singular values are shared evenly between the two.
    """

    left: Float[Tensor, "m r"]
    right: Float[Tensor, "r n"]
    residual: float  # ||D - left @ right|| / ||D||, Frobenius; 0.0 for a zero matrix
    energy: float  # ||left @ right||^2 / ||D||^2; 1.0 for a zero matrix
    method: str  # "subspace", "gram", "gram of blocks", "exact" (identity factor, no SVD needed)


def truncated_svd(
    matrix: Float[Tensor, "m n"],
    rank: int,
    *,
    generator: torch.Generator,
    pass_dtype: torch.dtype = torch.float32,
) -> LowRank:
    """Factors of ``matrix`` at ``rank``, within 1.001 of the Eckart-Young residual on spectra like those of weights.

    Args:
        matrix: any floating type, (m, n); computed in float32.
        rank: columns of ``left``. At ``rank >= min(m, n)`` the product is exact: one factor is the identity, padded.
        generator: source of the random start; its device need not be the matrix's.
        pass_dtype: number format of the large products (see ``matmul_dtype``).

    Raises:
        ValueError: rank below 1, an empty matrix, or an entry that is not finite.
    """
    return _factorise(matrix, rank, generator, pass_dtype)[0]


def batched_truncated_svd(
    matrices: Float[Tensor, "e m n"],
    rank: int,
    *,
    generator: torch.Generator,
    pass_dtype: torch.dtype = torch.float32,
) -> list[LowRank]:
    """``truncated_svd`` of every matrix of a stack (the experts of one layer).

    On an accelerator the stack goes through batched kernels; on a CPU one after the other, kinder to its cache.
    """
    if matrices.device.type == "cpu":
        return [_factorise(matrix, rank, generator, pass_dtype)[0] for matrix in matrices]
    return _factorise(matrices, rank, generator, pass_dtype)


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


def low_rank_of_blocks(
    blocks: Callable[[], Iterable[Float[Tensor, "_ n"]]], rows: int, columns: int, rank: int
) -> tuple[LowRank, float, int]:
    """Best factors at ``rank`` from the Gram matrix ``D^T D``, added up block by block.

    The right singular vectors V are eigenvectors of ``D^T D`` (float64); then ``left = D V_r``. Both factors carry the
    square root of the singular values. At ``rank >= columns`` the factors are ``D`` and the identity, exactly.

    Args:
        blocks: Gives the blocks of rows anew, in order; float32.
        rows: Rows of all blocks together.
        columns: Columns of every block.
        rank: Columns of ``left``; padded with zeros beyond ``columns``.

    Returns:
        The factors (method "gram of blocks"), the Frobenius norm of ``D``, and how often every block was asked for.

    Raises:
        ValueError: Rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if rank >= columns:
        return _identity_of_blocks(blocks, columns, rank)
    gram = torch.zeros(columns, columns, dtype=torch.float64)
    for block in blocks():
        gram += (block.mT @ block).double().cpu()
    total = float(gram.diagonal().sum())
    values, vectors = torch.linalg.eigh(gram)
    sigma = values[-rank:].flip(0).clamp_min(0.0).sqrt()
    basis = vectors[:, -rank:].flip(1)
    basis = basis * _signs(basis)
    root = sigma.sqrt()
    inverse = torch.where(root > 0, 1.0 / root, torch.zeros_like(root))
    lift = (basis * inverse).float()
    left = torch.cat([(block @ lift.to(block.device)).cpu() for block in blocks()])
    right = (basis * root).mT.float().contiguous()
    kept = float(sigma.square().sum())
    residual = math.sqrt(max(0.0, 1.0 - kept / total)) if total else 0.0
    return LowRank(left, right, residual, 1.0 - residual**2, _OF_BLOCKS), math.sqrt(total), 2


def _identity_of_blocks(blocks: Callable[[], Iterable[Tensor]], columns: int, rank: int) -> tuple[LowRank, float, int]:
    whole = torch.cat([block.cpu() for block in blocks()])
    norm = float(torch.linalg.vector_norm(whole, dtype=torch.float64))
    return LowRank(_pad(whole, columns=rank), torch.eye(rank, columns), 0.0, 1.0, _OF_BLOCKS), norm, 1


def _factorise(
    matrices: Float[Tensor, "*e m n"], rank: int, generator: torch.Generator, pass_dtype: torch.dtype
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
        return [_rescaled(matrix, norm, rank, generator, pass_dtype) for matrix, norm in zip(stack, norms, strict=True)]
    D = matrices.float()
    upright = m > n
    energies = torch.tensor(norms if matrices.ndim == 3 else norms[0], dtype=torch.float64, device=D.device).square()
    wide = D.mT if upright else D
    U, W, method = leading_factors(wide, rank, energy=energies, generator=generator, pass_dtype=pass_dtype)
    if matrices.ndim == 2:
        D, U, W = D[None], U[None], W[None]
    sigma = torch.linalg.vector_norm(W, dim=-1)
    captured = sigma.double().square().sum(-1).tolist()
    results = []
    for i, (norm, part) in enumerate(zip(norms, captured, strict=True)):
        energy = part / norm**2 if norm else 1.0
        if norm == 0.0:
            results.append(_zero_factors(D[i], rank))
        elif 1.0 - energy >= RESIDUAL_FROM_NORMS**2:
            left, right = _balance(U[i], W[i], sigma[i], upright)
            results.append(LowRank(left, right, math.sqrt(1.0 - energy), energy, method))
        else:
            results.append(_steep(D[i], rank, norm, method, generator))
    return results


def _rescaled(
    matrix: Float[Tensor, "m n"], norm: float, rank: int, generator: torch.Generator, pass_dtype: torch.dtype
) -> LowRank:
    """The factors of a matrix so large or small that squares of its Gram matrix would leave float32."""
    if norm == 0.0:
        return _zero_factors(matrix, rank)
    unit = _factorise(matrix.float() / norm, rank, generator, pass_dtype)[0]
    root = math.sqrt(norm)
    return replace(unit, left=unit.left * root, right=unit.right * root)


def _steep(D: Float[Tensor, "m n"], rank: int, norm: float, method: str, generator: torch.Generator) -> LowRank:
    """The factors of a matrix with hardly any residual, and that measured on the product."""
    upright = D.shape[0] > D.shape[1]
    U, W = steep_factors(D.mT if upright else D, rank, generator=generator)
    sigma = torch.linalg.vector_norm(W, dim=1)
    left, right = _balance(U, W, sigma, upright)
    residual = float(torch.linalg.vector_norm(D - left @ right)) / norm
    return LowRank(left, right, residual, 1.0 - residual**2, method)


def _balance(U: Tensor, W: Tensor, sigma: Tensor, upright: bool) -> tuple[Tensor, Tensor]:
    """``(left, right)`` of ``U.T @ W`` with the root of each singular value on either side.

    Rows of U are orthonormal, rows of W orthogonal.
    """
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
    return LowRank(_pad(left, columns=rank), _pad(right, rows=rank), 0.0, 1.0, "exact")


def _zero_factors(matrix: Float[Tensor, "m n"], rank: int) -> LowRank:
    m, n = matrix.shape

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=matrix.device)

    return LowRank(zeros(m, rank), zeros(rank, n), 0.0, 1.0, "exact")


def _signs(left: Tensor) -> Tensor:
    """Signs that make the largest entry of every column positive, so that equal inputs give equal factors."""
    largest = left.gather(0, left.abs().argmax(0, keepdim=True)).squeeze(0)
    return torch.where(largest < 0, -1.0, 1.0).to(left.dtype)


def _pad(matrix: Tensor, *, rows: int | None = None, columns: int | None = None) -> Tensor:
    more_rows = 0 if rows is None else rows - matrix.shape[0]
    more_columns = 0 if columns is None else columns - matrix.shape[1]
    return torch.nn.functional.pad(matrix, (0, more_columns, 0, more_rows)).contiguous()
