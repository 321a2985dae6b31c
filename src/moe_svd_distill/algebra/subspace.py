"""Leading singular subspaces of a stack of matrices: block Krylov for small ranks, Gram + eigh for large ones.

Bases are kept as rows, because ``basis @ matrix`` with row-major operands is the fastest order of the product.
"""

import torch
from jaxtyping import Float
from torch import Tensor

GRAM_FROM_RANK_SHARE = 0.2  # of min(m, n): from here the Gram matrix and its eigenvectors cost less
GRAM_UP_TO = 192  # min(m, n) up to which eigh is cheaper than any iteration
CHOLESKY_SHIFT = 1e-6


def prefers_gram(m: int, n: int, rank: int) -> bool:
    """Whether ``gram_factors`` is the cheaper way."""
    small = min(m, n)
    return small <= GRAM_UP_TO or rank > GRAM_FROM_RANK_SHARE * small


def gram_factors(matrices: Float[Tensor, "e m n"], rank: int) -> tuple[Float[Tensor, "e r m"], Float[Tensor, "e r n"]]:
    """Leading left vectors (rows of U) and ``W = U D`` by the eigenvectors of the smaller Gram matrix."""
    m, n = matrices.shape[-2:]
    if m > n:
        W, U = gram_factors(matrices.mT, rank)
        sigma = torch.linalg.vector_norm(U, dim=-1, keepdim=True)
        return U / sigma.clamp_min(torch.finfo(U.dtype).tiny), W * sigma
    vectors = torch.linalg.eigh(matrices @ matrices.mT)[1]
    U = vectors[..., -rank:].flip(-1).mT.contiguous()
    return U, U @ matrices


def krylov_factors(
    matrices: Float[Tensor, "e m n"],
    rank: int,
    *,
    generator: torch.Generator,
    pass_dtype: torch.dtype,
    blocks: int | None,
) -> tuple[Float[Tensor, "e r m"], Float[Tensor, "e r n"]]:
    """Leading left vectors (rows of U) and ``W = U D`` from a block Krylov space of ``D D^T``."""
    e, m, n = matrices.shape
    width, default_blocks = block_schedule(min(m, n), rank)
    count = default_blocks if blocks is None else max(1, blocks)
    while width * count < rank or width > min(m, n):
        count += 1
    count = min(count, min(m, n) // width)
    passed = matrices.to(pass_dtype)
    start = torch.randn(e, width, n, generator=generator, device=generator.device).to(matrices.device)
    basis = matrices.new_zeros(e, width * count, m)
    image = matrices.new_zeros(e, width * count, n)
    X = start
    for step in range(count):
        done = width * step
        Y = (X.to(pass_dtype) @ passed.mT).float()
        for _ in range(2):
            if step:
                before = basis[:, :done]
                Y = Y - (Y @ before.mT) @ before
            Y = orthonormal_rows(Y)
        basis[:, done : done + width] = Y
        X = (Y.to(pass_dtype) @ passed).float()
        image[:, done : done + width] = X
        X = orthonormal_rows(X) if step + 1 < count else X
    vectors = torch.linalg.eigh((image @ image.mT).double())[1]
    rotation = vectors[..., -rank:].flip(-1).mT.float()
    U = rotation @ basis
    return U, (rotation @ image if pass_dtype == torch.float32 else U @ matrices)


def block_schedule(small: int, rank: int) -> tuple[int, int]:
    """Width of a block and number of blocks that reach 1.001 of the optimal residual on flat spectra."""
    width = 8 if rank <= 16 else 32 if rank <= 96 else 64
    size = 3 * rank + 16
    return width, max(2, -(-size // width))


def orthonormal_rows(rows: Float[Tensor, "e b d"]) -> Float[Tensor, "e b d"]:
    """Cholesky QR: float32 Gram, equilibrated and shifted, factored in float64, solved in float32."""
    gram = rows @ rows.mT
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(rows.dtype).tiny).rsqrt()
    balanced = (gram * scale[..., None] * scale[..., None, :]).double()
    balanced.diagonal(dim1=-2, dim2=-1).add_(CHOLESKY_SHIFT)
    factor = torch.linalg.cholesky(balanced).float()
    return torch.linalg.solve_triangular(factor, rows * scale[..., None], upper=False)
