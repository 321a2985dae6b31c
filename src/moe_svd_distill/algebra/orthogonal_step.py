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
_TINY = 1e-12
_LIKE_ADAM = 0.2


def near_polar_factor(matrices: Float[Tensor, "n r c"], iterations: int = 4) -> Float[Tensor, "n r c"]:
    """Matrices of the same singular vectors, with singular values near one unless they were very small."""
    wide = matrices.shape[1] <= matrices.shape[2]
    found = matrices if wide else matrices.transpose(1, 2)
    found = found / (found.norm(dim=(1, 2), keepdim=True) + _TINY)
    for _ in range(iterations):
        square = found @ found.transpose(1, 2)
        mixed = torch.baddbmm(square, square, square, beta=_THIRD, alpha=_FIFTH)
        found = torch.baddbmm(found, mixed, found, beta=_FIRST)
    return found if wide else found.transpose(1, 2)


def adam_like_size(rows: int, columns: int) -> float:
    """What a near polar factor is multiplied by so that its entries are as large as those of a usual step of AdamW.

    0.2 · sqrt(max(rows, columns)), so that learning rates of AdamW carry over (Liu et al., arXiv 2502.16982).
    """
    return _LIKE_ADAM * math.sqrt(max(rows, columns))
