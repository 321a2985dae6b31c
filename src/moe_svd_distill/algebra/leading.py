"""Leading singular vectors by the way that costs least for a given matrix, rank and number format.

The cheapest wherever the large products run in float32 is a block Krylov space, grown until the captured energy is good
enough, because it asks for the fewest of them: the space of all ``(D D^T)^i D X`` holds far better vectors than its
last block alone, which is what subspace iteration keeps. Bases are kept as rows.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moe_svd_distill.algebra.subspace import gram_factors, momentum_factors, orthonormal_rows, row_gram

SMALL = 192  # min(m, n) up to which the eigendecomposition of the Gram matrix beats any iteration
LARGEST_MOMENTUM_SHARE = 0.2  # of min(m, n)

TOLERANCE = 0.001  # allowed excess of the residual over the Eckart-Young optimum
ORTHOGONALITY = 1e-3  # loss above which a block is orthogonalised once more
LATER_BLOCKS = 1.6
AIM = 1.15  # how far below the allowed missing energy the next size is aimed
DECAY_BOUNDS = (0.1, 0.8)  # what is believed of the decay from block to block
LARGEST_SHARE = 0.75  # of min(m, n): beyond this size the whole eigendecomposition is cheaper


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
) -> tuple[Float[Tensor, "*e r m"], Float[Tensor, "*e r n"], str]:
    """``(U, W, method)`` for m <= n: leading left singular vectors as rows, ``W = U D``, "gram" or "subspace".

    ``energy`` is ``||D||^2`` of every matrix, float64.
    """
    m, n = matrix.shape[-2:]
    way = cheapest_method(m, n, rank, pass_dtype)
    if way == "eigh":
        return *gram_factors(matrix, rank), "gram"
    if way == "momentum":
        return *momentum_factors(matrix, rank, generator=generator, pass_dtype=pass_dtype), "subspace"
    by_gram = way == "gram-krylov"
    return *krylov_factors(matrix, rank, energy=energy, generator=generator, by_gram=by_gram), "subspace"


def first_size(rank: int, by_gram: bool) -> int:
    """Dimension of the Krylov space at which convergence is looked at for the first time.

    Enough for power laws. With the Gram matrix another block costs less than another look, so it starts later.
    """
    return 3 * rank if by_gram else 24 + 9 * rank // 4


def block_width(rank: int, by_gram: bool) -> int:
    """Rows of one block: wide enough for an efficient product, narrow enough for a high degree."""
    if by_gram:
        return 32
    return 16 if rank <= 24 else 32 if rank <= 80 else 48 if rank <= 160 else 64


def krylov_factors(
    matrix: Float[Tensor, "*e m n"],
    rank: int,
    *,
    energy: Float[Tensor, "*e"],
    generator: torch.Generator,
    by_gram: bool = False,
) -> tuple[Float[Tensor, "*e r m"], Float[Tensor, "*e r n"]]:
    """``(U, W)``: leading left singular vectors as rows, and ``W = U D``, for m <= n.

    ``energy`` is ``||D||^2`` of every matrix, float64.
    ``by_gram`` forms ``D D^T`` once and grows the space with it: cheaper for large spaces of oblong matrices.
    The space grows until ``missing_energy`` promises a residual within ``TOLERANCE`` of the optimum.
    """
    m = matrix.shape[-2]
    space = _Space(matrix, block_width(rank, by_gram), by_gram, generator)
    wanted = max(-(-first_size(rank, by_gram) // space.width), rank // space.width + 1)
    while wanted * space.width <= LARGEST_SHARE * m:
        space.grow(wanted)
        projected = space.projected()
        values, vectors = torch.linalg.eigh(projected)
        missing = missing_energy(projected, values, vectors, space.width, rank)
        rest = energy - values[..., -rank:].double().sum(-1)
        allowed = torch.maximum(2.0 * TOLERANCE * rest, 1e-7 * energy)
        excess = float(torch.where(energy > 0, missing / allowed, torch.zeros_like(missing)).max())
        if excess <= 1.0:
            return space.lift(vectors[..., -rank:])
        decay = decay_per_block(vectors, space.width, rank)
        more = math.ceil(math.log(AIM * excess) / -math.log(decay)) if math.isfinite(excess) else wanted // 4
        wanted += max(1, min(more, wanted // 3))
    return gram_factors(matrix, rank)


def decay_per_block(vectors: Float[Tensor, "*e k k"], width: int, rank: int) -> float:
    """By how much the last block's weight in the best Ritz vectors is below the one before; slowest of a stack."""
    last = vectors[..., -width:, -rank:].square().sum(dim=(-2, -1))
    before = vectors[..., -2 * width : -width, -rank:].square().sum(dim=(-2, -1))
    decay = float((last / before.clamp_min(torch.finfo(before.dtype).tiny)).max())
    return min(max(decay, DECAY_BOUNDS[0]), DECAY_BOUNDS[1])


def missing_energy(
    projected: Float[Tensor, "*e k k"],
    values: Float[Tensor, "*e k"],
    vectors: Float[Tensor, "*e k k"],
    width: int,
    rank: int,
) -> Float[Tensor, "*e"]:
    """Energy that the ``rank`` best vectors of the space still lack, estimated from the last block alone.

    A Ritz vector y leaves the residual ``|beta y_last|``; another block would raise its Ritz value theta by that
    squared over ``theta - alpha``. Both are unknown for the next block. Taken instead: beta of the last block,
    and for alpha the middle between the last block's mean and the first Ritz value left out. ``LATER_BLOCKS`` makes up
    for the blocks after the next one; it was measured on Gaussian, uniform, sparse, power-law and exponential spectra,
    where the estimate is 0.6 to 4 times the truth, and about right on flat ones.
    """
    last = projected[..., -width:, :]
    beta = last[..., -2 * width : -width].square().sum(dim=(-2, -1)) / width
    alpha = (last[..., -width:].diagonal(dim1=-2, dim2=-1).mean(-1) + values[..., -rank - 1]) / 2
    gap = values[..., -rank:] - alpha[..., None]
    weight = vectors[..., -width:, -rank:].square().sum(-2)
    gained = (beta[..., None] * weight / gap).double().sum(-1)
    return torch.where((gap <= 0).any(-1), math.inf, LATER_BLOCKS * gained)


class _Space:
    """An orthonormal row basis of the Krylov space and what D makes of it.

    ``image`` is ``basis D``, or ``basis D D^T`` where the Gram matrix is at hand; both give the next block.
    """

    def __init__(self, matrix: Tensor, width: int, by_gram: bool, generator: torch.Generator) -> None:
        *batch, m, n = matrix.shape
        self.matrix = matrix
        self.width = min(width, m)
        self.gram = row_gram(matrix) if by_gram else None
        self.blocks = 0
        start = torch.randn(*batch, self.width, n, generator=generator, device=generator.device)
        self.start = start.to(matrix.device, matrix.dtype)
        capacity = int(LARGEST_SHARE * m) + self.width
        self.basis = matrix.new_empty(*batch, capacity, m)
        self.image = matrix.new_empty(*batch, capacity, m if by_gram else n)
        self.products = matrix.new_empty(*batch, capacity, capacity)

    def grow(self, blocks: int) -> None:
        """Add blocks until there are this many."""
        while self.blocks < blocks:
            self._add_block()

    def projected(self) -> Tensor:
        """``basis D D^T basis^T``. Its rows were found while later blocks were made orthogonal, except for the last."""
        size = self.blocks * self.width
        last = self.image[..., size - self.width : size, :]
        opposite = self.image if self.gram is None else self.basis
        self._keep_products(size - self.width, last @ opposite[..., :size, :].mT)
        return self.products[..., :size, :size]

    def lift(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Ritz vectors (columns, ascending) as rows in full length, and their image under D."""
        rotation = vectors.flip(-1).mT
        size = self.blocks * self.width
        U = rotation @ self.basis[..., :size, :]
        return U, rotation @ self.image[..., :size, :] if self.gram is None else U @ self.matrix

    def _add_block(self) -> None:
        start = self.blocks * self.width
        stop = start + self.width
        before = self.basis[..., :start, :]
        rows = self._next_rows()
        if start:
            shares = rows @ before.mT
            self._keep_products(start - self.width, shares)
            rows = rows - shares @ before
        rows = orthonormal_rows(rows)
        if self._loss(rows, before) > ORTHOGONALITY:
            rows = orthonormal_rows(rows - (rows @ before.mT) @ before)
        self.basis[..., start:stop, :] = rows
        self.image[..., start:stop, :] = rows @ (self.matrix if self.gram is None else self.gram)
        self.blocks += 1

    def _next_rows(self) -> Tensor:
        """The last block times ``D D^T``; in the beginning random rows times ``D^T``."""
        stop = self.blocks * self.width
        rows = self.image[..., stop - self.width : stop, :] if stop else self.start
        if stop and self.gram is not None:
            return rows
        if self.matrix.is_contiguous():
            return (self.matrix @ rows.mT).mT
        return rows @ self.matrix.mT

    def _keep_products(self, start: int, rows: Tensor) -> None:
        stop = start + self.width
        self.products[..., start:stop, :stop] = rows
        self.products[..., :stop, start:stop] = rows.mT

    @staticmethod
    def _loss(rows: Tensor, before: Tensor) -> float:
        """How far the sum of the rows is from its proper length and from orthogonal to the earlier ones."""
        probe = rows.sum(-2, keepdim=True)
        length = math.sqrt(rows.shape[-2])
        inward = torch.linalg.vector_norm(probe @ before.mT, dim=-1)
        outward = (torch.linalg.vector_norm(probe, dim=-1) - length).abs()
        return float(torch.maximum(inward, outward).max()) / length
