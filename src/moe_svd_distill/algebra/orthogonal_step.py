"""The direction of a matrix with all its singular values brought near one: the step of Muon.

Momentum of a matrix is dominated by few directions; a step of equal size in all of them learns faster (Jordan et al.,
"Muon", 2024). The polar factor is approximated by a quintic Newton–Schulz iteration with the coefficients given there.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_FIRST, _THIRD, _FIFTH = 3.4445, -4.7750, 2.0315
_ITERATIONS = 4
_TINY = 1e-12
_LIKE_ADAM = 0.2
_MUCH_WIDER = 1.5


def near_polar_factor(matrices: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
    """Matrices of the same singular vectors, with singular values near one unless they were very small.

    What multiplies a matrix is a polynomial of its Gram matrix. Where that is much smaller than the matrix, the
    iteration runs on it alone and the matrix is multiplied once, at the end.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    found = matrices if wide else matrices.transpose(1, 2)
    found = found / (found.norm(dim=(1, 2), keepdim=True) + _TINY)
    if found.shape[2] >= _MUCH_WIDER * found.shape[1]:
        found = _multiplier(found @ found.transpose(1, 2)) @ found
    else:
        for _ in range(_ITERATIONS):
            found = torch.baddbmm(found, _mixed(found @ found.transpose(1, 2)), found, beta=_FIRST)
    return found if wide else found.transpose(1, 2)


def _multiplier(square: Tensor) -> Tensor:
    """What all iterations together multiply a matrix with, from its Gram matrix, (n, r, r)."""
    product: Tensor | None = None
    for left in reversed(range(_ITERATIONS)):
        factor = _mixed(square)
        factor.diagonal(dim1=1, dim2=2).add_(_FIRST)
        product = factor if product is None else factor @ product
        if left:
            square = factor @ square @ factor
    assert product is not None
    return product


def _mixed(square: Tensor) -> Tensor:
    return torch.baddbmm(square, square, square, beta=_THIRD, alpha=_FIFTH)


def adam_like_size(rows: int, columns: int) -> float:
    """What a near polar factor is multiplied by so that its entries are as large as those of a usual step of AdamW.

    0.2 · sqrt(max(rows, columns)), so that learning rates of AdamW carry over (Liu et al., arXiv 2502.16982).
    """
    return _LIKE_ADAM * math.sqrt(max(rows, columns))
