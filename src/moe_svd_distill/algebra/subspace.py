"""Leading singular vectors from the smaller Gram matrix, or by subspace iteration; orthonormal rows by Cholesky QR.

The iteration is for devices whose low-precision products are nearly free. Bases are kept as rows, since
``rows @ matrix`` is the fastest order of the product.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SHIFT = 1e-6  # added to the unit diagonal, so that dependent rows still have a factor
BLOCKS = 4  # a symmetric product in this many block columns needs (1 + 1/BLOCKS) / 2 of the multiplications
HALVED_FROM = 256  # rows
DAMPED_PASSES = (1, 2, 4)
STEEP_PASSES = 2


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


def row_gram(matrix: Float[Tensor, "*e m n"]) -> Float[Tensor, "*e m m"]:
    """``D D^T``. On a CPU only the blocks on and below the diagonal are multiplied, the others copied."""
    m = matrix.shape[-2]
    if m < HALVED_FROM or matrix.device.type != "cpu":
        return matrix @ matrix.mT
    gram = matrix.new_empty(*matrix.shape[:-1], m)
    step = -(-m // BLOCKS)
    for start in range(0, m, step):
        stop = min(m, start + step)
        block = matrix[..., start:, :] @ matrix[..., start:stop, :].mT
        gram[..., start:, start:stop] = block
        gram[..., start:stop, stop:] = block[..., stop - start :, :].mT
    return gram


def gram_factors(matrix: Float[Tensor, "*e m n"], rank: int) -> tuple[Float[Tensor, "*e r m"], Float[Tensor, "*e r n"]]:
    """``(U, W)``: leading left singular vectors as rows, and ``W = U D``, for m <= n.

    Costs ``m^2 n`` multiplications, an eigendecomposition of size m and ``2 r m n``. Singular values below 3e-4 of the
    largest are lost in float32.
    """
    vectors = torch.linalg.eigh(row_gram(matrix))[1]
    U = vectors[..., -rank:].flip(-1).mT.contiguous()
    return U, U @ matrix


def momentum_factors(
    matrix: Float[Tensor, "*e m n"],
    rank: int,
    *,
    generator: torch.Generator,
    pass_dtype: torch.dtype,
) -> tuple[Float[Tensor, "*e r m"], Float[Tensor, "*e r n"]]:
    """``(U, W)``: leading left singular vectors as rows, and ``W = U D``.

    Randomised subspace iteration (Halko, Martinsson, Tropp 2011) with momentum against the bulk of the spectrum: with
    a the smallest eigenvalue of ``Z^T Z`` the step is ``D Z - a/2 Q - a^2/16 Q_prev R^-1``, a Chebyshev recurrence on
    [0, a]. The products with D run in ``pass_dtype``, all else in float32 and float64.
    """
    *batch, m, n = matrix.shape
    width = min(rank + max(16, rank // 4), m, n)
    count = 3 if rank <= 16 else 5
    H = matrix.to(pass_dtype)
    start = torch.randn(*batch, width, n, generator=generator, device=generator.device).to(matrix.device, pass_dtype)
    Q = orthonormal_rows((start @ H.mT).float())
    previous: Tensor | None = None
    R: Tensor | None = None
    for step in range(1, count + 1):
        Z = (Q.to(pass_dtype) @ H).float()
        Y = (Z.to(pass_dtype) @ H.mT).float()
        if step in DAMPED_PASSES:
            damping = torch.linalg.eigvalsh(Z @ Z.mT)[..., :1, None].clamp_min(0.0)
            Y = Y - damping / 2 * Q
            if previous is not None and R is not None and step != DAMPED_PASSES[0]:
                Y = Y - damping.square() / 16 * torch.linalg.solve_triangular(R.mT, previous, upper=False)
        previous = Q
        Q, R = cholesky_qr(Y)
    Q = orthonormal_rows(Q)
    B = Q @ matrix
    vectors = torch.linalg.eigh((B @ B.mT).double())[1]
    rotation = vectors[..., -rank:].flip(-1).mT.float()
    return rotation @ Q, rotation @ B


def steep_factors(
    matrix: Float[Tensor, "m n"], rank: int, *, generator: torch.Generator
) -> tuple[Float[Tensor, "r m"], Float[Tensor, "r n"]]:
    """``(U, W)`` of a matrix with hardly any residual at this rank, right to the last digits of float32.

    Gram matrices square the singular values and lose those below 3e-4 of the largest; Householder QR does not. A few
    directions more than ``rank`` and two passes suffice where the spectrum falls that fast.
    """
    m, n = matrix.shape
    width = min(rank + 16, m, n)
    start = torch.randn(n, width, generator=generator, device=generator.device).to(matrix.device, matrix.dtype)
    Q = torch.linalg.qr(matrix @ start)[0]
    for _ in range(STEEP_PASSES):
        Q = torch.linalg.qr(matrix.mT @ Q)[0]
        Q = torch.linalg.qr(matrix @ Q)[0]
    vectors, sigma, rows = torch.linalg.svd(Q.mT @ matrix, full_matrices=False)
    return (Q @ vectors[:, :rank]).mT, sigma[:rank, None] * rows[:rank]
