"""Which of the ways to the leading singular vectors costs least for a given matrix, rank and number format."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe_svd_distill.algebra.gram import gram_factors
from moe_svd_distill.algebra.krylov import first_size, krylov_factors
from moe_svd_distill.algebra.subspace import momentum_factors

SMALL = 192  # min(m, n) up to which the eigendecomposition of the Gram matrix beats any iteration
LARGEST_MOMENTUM_SHARE = 0.2  # of min(m, n)


def cheapest_method(m: int, n: int, rank: int, pass_dtype: torch.dtype) -> str:
    """The name "eigh", "krylov", "gram-krylov" or "momentum": the way of fewest multiplications for an m x n matrix.

    float32: a count of multiplications, with the constants of matrix products, eigendecompositions (11 k^3) and the
    growth of the Krylov space measured at one thread. Lower precision makes the passes nearly free: momentum up to a
    fifth of the size.
    """
    small, large = min(m, n), max(m, n)
    if small <= SMALL:
        return "eigh"
    if pass_dtype != torch.float32:
        return "momentum" if rank <= LARGEST_MOMENTUM_SHARE * small else "eigh"
    size = 1.15 * first_size(rank, by_gram=False)
    overhead = 4 * size**2 * small + 11 * size**3
    half_gram, image = 1.2 * small**2 * large, 2 * small * large * rank
    costs = {
        "eigh": half_gram + 11 * small**3 + image,
        "krylov": 5 * small * large * size + overhead + 2 * rank * size * (small + large),
        "gram-krylov": half_gram + 2.5 * small**2 * size + overhead + 2 * rank * size * small + image,
    }
    return min(costs, key=lambda name: costs[name])


def leading_factors(
    matrix: Float[Tensor, "*e m n"],
    rank: int,
    *,
    energy: Float[Tensor, "*e"],
    generator: torch.Generator,
    pass_dtype: torch.dtype,
    passes: int | None,
) -> tuple[Float[Tensor, "*e r m"], Float[Tensor, "*e r n"], str]:
    """``(U, W, method)`` for m <= n: leading left singular vectors as rows, ``W = U D``, "gram" or "subspace".

    ``energy`` is ``||D||^2`` of every matrix, float64.
    """
    m, n = matrix.shape[-2:]
    way = cheapest_method(m, n, rank, pass_dtype)
    if way == "eigh":
        return *gram_factors(matrix, rank), "gram"
    if way == "momentum":
        factors = momentum_factors(matrix, rank, generator=generator, pass_dtype=pass_dtype, passes=passes)
        return *factors, "subspace"
    by_gram = way == "gram-krylov"
    factors = krylov_factors(matrix, rank, energy=energy, generator=generator, by_gram=by_gram, blocks=passes)
    return *factors, "subspace"
