"""Leading singular vectors from a block Krylov space, grown until the captured energy is good enough.

The cheapest way wherever the large products run in float32, because it asks for the fewest of them: the space of all
``(D D^T)^i D X`` holds far better vectors than its last block alone, which is what subspace iteration keeps.
Bases are kept as rows, since ``rows @ matrix`` is the fastest order of the product.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moe_svd_distill.algebra.gram import gram_factors, row_gram
from moe_svd_distill.algebra.orthonormal import orthonormal_rows

TOLERANCE = 0.001  # allowed excess of the residual over the Eckart-Young optimum
ORTHOGONALITY = 1e-3  # loss above which a block is orthogonalised once more
RATE = 2.5  # by which one more block typically divides the missing energy
LARGEST_SHARE = 0.75  # of min(m, n): beyond this size the whole eigendecomposition is cheaper


def first_size(rank: int) -> int:
    """Dimension of the Krylov space at which convergence is looked at for the first time."""
    return 32 + 22 * rank // 10


def block_width(rank: int) -> int:
    """Rows of one block: wide enough for an efficient product, narrow enough for a high degree."""
    return 16 if rank <= 32 else 32 if rank <= 96 else 48 if rank <= 192 else 64


def krylov_factors(
    matrix: Float[Tensor, "*e m n"],
    rank: int,
    *,
    generator: torch.Generator,
    by_gram: bool = False,
    blocks: int | None = None,
) -> tuple[Float[Tensor, "*e r m"], Float[Tensor, "*e r n"]]:
    """``(U, W)``: leading left singular vectors as rows, and ``W = U D``, for m <= n.

    ``by_gram`` forms ``D D^T`` once and grows the space with it: cheaper for large spaces of flat matrices. ``blocks`` fixes the number of
    blocks; by default the space grows until ``missing_energy`` promises a residual within ``TOLERANCE`` of the optimum.
    """
    m = matrix.shape[-2]
    space = _Space(matrix, block_width(rank), by_gram, generator)
    wanted = blocks if blocks is not None else -(-first_size(rank) // space.width)
    wanted = max(wanted, -(-rank // space.width))
    total = torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=-1).double(), dim=-1).square()
    while wanted * space.width <= LARGEST_SHARE * m:
        space.grow(wanted)
        values, vectors = torch.linalg.eigh(space.projected)
        if blocks is not None:
            return space.lift(vectors[..., -rank:])
        missing = missing_energy(space.projected, values, vectors, space.width, rank)
        rest = total - values[..., -rank:].double().sum(-1)
        allowed = (2.0 * TOLERANCE * rest).clamp_min(1e-7 * total)
        excess = float((missing / allowed.clamp_min(torch.finfo(torch.float64).tiny)).max())
        if excess <= 1.0:
            return space.lift(vectors[..., -rank:])
        more = math.ceil(math.log(excess) / math.log(RATE)) if math.isfinite(excess) else wanted // 4
        wanted += max(1, min(more, wanted // 3))
    return gram_factors(matrix, rank)


def missing_energy(
    projected: Float[Tensor, "*e k k"],
    values: Float[Tensor, "*e k"],
    vectors: Float[Tensor, "*e k k"],
    width: int,
    rank: int,
) -> Float[Tensor, "*e"]:
    """Energy that the ``rank`` best vectors of the space still lack, estimated from the last block alone.

    A Ritz vector y leaves the residual ``|beta y_last|``; another block would raise its Ritz value theta by that squared
    over ``theta - alpha``. beta and alpha, unknown for the next block, are taken from the last one. The factor in front, for
    all later blocks, is an upper envelope measured on flat, power-law and exponential spectra. Infinite before the space
    has told signal from bulk.
    """
    last = projected[..., -width:, :]
    beta = last[..., -2 * width : -width].square().sum(dim=(-2, -1)) / width
    alpha = last[..., -width:].diagonal(dim1=-2, dim2=-1).mean(-1)
    gap = values[..., -rank:] - alpha[..., None]
    weight = vectors[..., -width:, -rank:].square().sum(-2)
    gained = (beta[..., None] * weight / gap).double().sum(-1)
    unresolved = (gap <= 0).any(-1)
    return torch.where(unresolved, math.inf, (2.2 + 22.0 / rank) * gained)


class _Space:
    """An orthonormal row basis of the Krylov space, its image under D, and ``basis D D^T basis^T``."""

    def __init__(self, matrix: Tensor, width: int, by_gram: bool, generator: torch.Generator) -> None:
        *batch, m, n = matrix.shape
        self.matrix = matrix
        self.width = min(width, m)
        self.gram = row_gram(matrix) if by_gram else None
        self.blocks = 0
        start = torch.randn(*batch, self.width, n, generator=generator, device=generator.device)
        self.next = self._times_transpose(start.to(matrix.device, matrix.dtype))
        capacity = int(LARGEST_SHARE * m) + self.width
        self.basis = matrix.new_empty(*batch, capacity, m)
        self.image = None if by_gram else matrix.new_empty(*batch, capacity, n)
        self.products = matrix.new_empty(*batch, capacity, capacity)

    @property
    def projected(self) -> Tensor:
        size = self.blocks * self.width
        return self.products[..., :size, :size]

    def grow(self, blocks: int) -> None:
        while self.blocks < blocks:
            self._add_block()

    def lift(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Ritz vectors (columns, ascending) as rows in full length, and their image."""
        rotation = vectors.flip(-1).mT
        size = self.blocks * self.width
        U = rotation @ self.basis[..., :size, :]
        return U, U @ self.matrix if self.image is None else rotation @ self.image[..., :size, :]

    def _add_block(self) -> None:
        start = self.blocks * self.width
        stop = start + self.width
        before = self.basis[..., :start, :]
        rows = self.next
        if start:
            rows = rows - (rows @ before.mT) @ before
        rows = orthonormal_rows(rows)
        if self._loss(rows, before) > ORTHOGONALITY:
            rows = orthonormal_rows(rows - (rows @ before.mT) @ before)
        self.basis[..., start:stop, :] = rows
        if self.gram is not None:
            self.next = rows @ self.gram
            products = self.next @ self.basis[..., :stop, :].mT
        else:
            assert self.image is not None
            image = rows @ self.matrix
            self.image[..., start:stop, :] = image
            self.next = self._times_transpose(image)
            products = image @ self.image[..., :stop, :].mT
        self.products[..., start:stop, :stop] = products
        self.products[..., :stop, start:stop] = products.mT
        self.blocks += 1

    def _times_transpose(self, rows: Tensor) -> Tensor:
        if self.matrix.is_contiguous():
            return (self.matrix @ rows.mT).mT
        return rows @ self.matrix.mT

    @staticmethod
    def _loss(rows: Tensor, before: Tensor) -> float:
        """How far a random-looking combination of the rows is from unit length and from orthogonal to the earlier ones."""
        probe = rows.sum(-2, keepdim=True)
        length = math.sqrt(rows.shape[-2])
        inward = torch.linalg.vector_norm(probe @ before.mT, dim=-1)
        outward = (torch.linalg.vector_norm(probe, dim=-1) - length).abs()
        return float(torch.maximum(inward, outward).max()) / length
