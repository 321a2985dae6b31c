"""Leading singular vectors by the eigenvectors of the smaller Gram matrix."""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCKS = 4  # a symmetric product in this many block columns needs (1 + 1/BLOCKS) / 2 of the multiplications
HALVED_FROM = 256  # rows


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
