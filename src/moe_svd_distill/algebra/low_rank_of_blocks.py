"""Low-rank factors of a matrix that is seen one block of rows at a time: the head of a large vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class BlockLowRank:
    """``left @ right``, the best rank-r approximation of the matrix ``D``.

    Attributes:
        left: (rows, rank).
        right: (rank, columns).
        norm: Frobenius norm of ``D``.
        residual: ``||D - left @ right|| / ||D||``; 0 for a zero matrix.
        passes: How often every block was asked for.
    """

    left: Float[Tensor, "m r"]
    right: Float[Tensor, "r n"]
    norm: float
    residual: float
    passes: int


def low_rank_of_blocks(
    blocks: Callable[[], Iterable[Float[Tensor, "_ n"]]], rows: int, columns: int, rank: int
) -> BlockLowRank:
    """Best factors at ``rank`` from the Gram matrix ``D^T D``, added up block by block.

    The right singular vectors V are eigenvectors of ``D^T D`` (float64); then ``left = D V_r``. Both factors carry the
    square root of the singular values. At ``rank >= columns`` the factors are ``D`` and the identity, exactly.

    Args:
        blocks: Gives the blocks of rows anew, in order; float32.
        rows: Rows of all blocks together.
        columns: Columns of every block.
        rank: Columns of ``left``; padded with zeros beyond ``columns``.

    Raises:
        ValueError: Rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if rank >= columns:
        return _identity(blocks, columns, rank)
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
    return BlockLowRank(left, right, math.sqrt(total), residual, passes=2)


def _identity(blocks: Callable[[], Iterable[Tensor]], columns: int, rank: int) -> BlockLowRank:
    whole = torch.cat([block.cpu() for block in blocks()])
    norm = float(torch.linalg.vector_norm(whole, dtype=torch.float64))
    left = torch.nn.functional.pad(whole, (0, rank - columns))
    return BlockLowRank(left, torch.eye(rank, columns), norm, 0.0, passes=1)


def _signs(basis: Tensor) -> Tensor:
    """Make the largest entry of every column positive, so that equal inputs give equal factors."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(basis.dtype)
