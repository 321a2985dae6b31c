"""PEFT's layout for a parameter that holds several matrices: one A and one B for all of them.

For ``W (experts, out, in)``, or ``(experts, in, out)`` where it is held transposed, A is ``(experts · r, in)`` with row
``e · r + k``, and B is ``(out, r · experts)`` with column ``k · experts + e``: the opposite order. (PEFT 0.21,
``ParamWrapper.get_delta_weight``.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_svd_distill.architecture.matrices import Matrix

Factors = tuple[Tensor, Tensor]
"""``(B, A)`` of a matrix: (out, rank) and (rank, in)."""


def fused_rank(matrices: Sequence[Matrix], rank_of: Callable[[str], int]) -> int:
    """The rank of a parameter: that of its matrices, summed where several lie beside each other in one expert."""
    first = matrices[0].piece.index
    return sum(rank_of(matrix.name) for matrix in matrices if matrix.piece.index == first)


def fuse(matrices: Sequence[Matrix], factors_of: Callable[[str], Factors]) -> Factors:
    """The pair of a parameter from those of all matrices in it.

    Args:
        matrices: Every matrix of the parameter.
        factors_of: Matrix name to ``(B, A)``; those of all experts have the same ranks.

    Returns:
        ``(B, A)`` as PEFT holds them.
    """
    if matrices[0].piece.index is None:
        return factors_of(matrices[0].name)
    shape = matrices[0].slot.shape
    out, width = (shape[2], shape[1]) if matrices[0].transposed else (shape[1], shape[2])
    swapped = matrices[0].swapped_in_peft
    lefts, rights = [], []
    for expert in range(shape[0]):
        columns, rows = [], []
        for matrix in (matrix for matrix in matrices if matrix.piece.index == expert):
            left, right = factors_of(matrix.name)
            columns.append(_widened(left.T, matrix, of_rows=True, size=out).T)
            rows.append(_widened(right, matrix, of_rows=False, size=width))
        left, right = torch.cat(columns, dim=1), torch.cat(rows)
        lefts.append(right.T if swapped else left)
        rights.append(left.T if swapped else right)
    left = torch.stack(lefts).permute(1, 2, 0).reshape(width if swapped else out, -1)
    return left.contiguous(), torch.cat(rights).contiguous()


def expert_factors(left: Tensor, right: Tensor, experts: int, number: int) -> Factors:
    """``(B, A)`` of one expert in the pair of a parameter, as views."""
    rank = right.shape[0] // experts
    return left.view(len(left), rank, experts)[:, :, number], right.view(experts, rank, -1)[number]


def of_matrix(matrix: Matrix, factors: Factors) -> Factors:
    """``(B, A)`` of a matrix from those that PEFT has for the whole expert it lies in."""
    left, right = (factors[1].T, factors[0].T) if matrix.swapped_in_peft else factors
    begin, length = matrix.piece.begin, matrix.piece.length
    if begin is None:
        return left, right
    part = slice(begin, begin + length)
    return (left[part], right) if _narrows_rows(matrix) else (left, right[:, part])


def _widened(factor: Tensor, matrix: Matrix, *, of_rows: bool, size: int) -> Tensor:
    """A factor (rank, n) with zeros where the other matrices of its expert lie."""
    begin, length = matrix.piece.begin, matrix.piece.length
    if begin is None or _narrows_rows(matrix) != of_rows:
        return factor
    return torch.nn.functional.pad(factor, (begin, size - begin - length))


def _narrows_rows(matrix: Matrix) -> bool:
    """Whether a matrix takes some of its expert's rows (outputs), rather than some of its columns."""
    return (matrix.piece.dim == 0) != matrix.transposed
