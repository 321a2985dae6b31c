"""Orthonormal rows by matrix products: Cholesky QR."""

import torch
from jaxtyping import Float
from torch import Tensor

SHIFT = 1e-6  # added to the unit diagonal, so that dependent rows still have a factor


def cholesky_qr(rows: Float[Tensor, "*e b d"]) -> tuple[Float[Tensor, "*e b d"], Float[Tensor, "*e b b"]]:
    """``(Q, R)`` with ``rows = R^T Q`` up to the shift, and the rows of Q orthonormal to about 1e-3 or better.

    float32 Gram matrix, diagonal brought to one, shifted, factored in float64 (Yamamoto et al. 2015, Fukaya et al.
    2020). R is the upper triangular factor. Apply it twice where more is needed. Zero rows stay zero. Rows so dependent
    that even the shifted matrix has no factor go through Householder QR.
    """
    gram = rows @ rows.mT
    scale = gram.diagonal(dim1=-2, dim2=-1).double().clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    balanced = gram * scale[..., None] * scale[..., None, :]
    balanced.diagonal(dim1=-2, dim2=-1).add_(SHIFT)
    factor, failed = torch.linalg.cholesky_ex(balanced)
    if bool(failed.any()):
        Q, R = torch.linalg.qr(rows.mT)
        return Q.mT, R
    inverse = torch.linalg.solve_triangular(factor, torch.diag_embed(scale), upper=False)
    return inverse.to(rows.dtype) @ rows, (factor / scale[..., None]).mT.to(rows.dtype)


def orthonormal_rows(rows: Float[Tensor, "*e b d"]) -> Float[Tensor, "*e b d"]:
    """The Q of ``cholesky_qr``."""
    return cholesky_qr(rows)[0]
