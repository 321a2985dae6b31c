"""Trained pairs of one shape in one layer (experts), stacked so that one batched product serves all.

A pair whose rank is the smaller side of its matrix can make any change at all. Then nothing is gained by two factors:
one is the identity, and the other, which is the change itself, moves alone (docs/decisions/0020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_svd_distill.architecture.matrices import Kind
from moe_svd_distill.errors import UsageError
from moe_svd_distill.streaming import Matrix
from moe_svd_distill.streaming.states_file import slices

FULL_DELTA_RATE = 0.5
"""Learning rate of a change that moves as a whole, as a share of that of two factors."""
_CHUNK_BYTES = 32 << 20
_PRODUCTS = 3  # with each factor, on the way there and back
_WIDE_BYTES = 4

Pair = tuple[Tensor, Tensor]
"""``(B, A)`` with (rows, rank) and (rank, columns)."""


def full_rank_pair(change: Tensor) -> Pair:
    """``(B, A)`` whose product is a change, (rows, columns): the factor on the smaller side is the identity."""
    rows, columns = change.shape
    one = torch.eye(min(rows, columns), dtype=change.dtype, device=change.device)
    return (one, change) if rows <= columns else (change, one)


def with_rank(pair: Pair, rank: int) -> Pair:
    """The same product with zeros up to a rank that is no lower, so that all pairs are alike."""
    left, right = pair
    lacking = rank - len(right)
    return torch.nn.functional.pad(left, (0, lacking)), torch.nn.functional.pad(right, (0, 0, 0, lacking))


@dataclass(frozen=True)
class Block:
    """Matrices of one shape that follow each other in the flat buffers.

    Attributes:
        begin: Where they begin.
        count: How many.
        rows: Of each.
        columns: Of each.
        rate: Share of the learning rate that they move with.
    """

    begin: int
    count: int
    rows: int
    columns: int
    rate: float

    @property
    def end(self) -> int:
        """Where they end."""
        return self.begin + self.count * self.rows * self.columns

    def of(self, flat: Tensor) -> Tensor:
        """Their place in a flat buffer, (count, rows, columns)."""
        return flat[self.begin : self.end].view(self.count, self.rows, self.columns)


class Stack(Protocol):
    """Pairs of one shape in one layer."""

    @property
    def weights(self) -> tuple[Matrix, ...]:
        """Where their products go."""

    def chunks(self) -> Iterator[slice]:
        """Ranges of pairs whose products take a bounded amount of memory together."""

    def changes(self, chunk: slice) -> Tensor:
        """The products B·A of some pairs, (n, rows, columns); not to be written to."""

    def accumulate_gradients(self, chunk: slice, slopes: Tensor) -> None:
        """Add what follows from gradients by the weights, (n, rows, columns), to the gradients of what moves."""

    def draw(self, generator: torch.Generator) -> None:
        """Begin with pairs that change nothing, as PEFT does."""

    def begin_with(self, place: int, left: Tensor, right: Tensor) -> None:
        """Begin with a given pair of this rank or less, whose product is kept exactly.

        Raises:
            UsageError: Its rank is higher.
        """

    def multiply(self, scale: float) -> None:
        """Every product times a number."""

    def pair(self, place: int) -> Pair:
        """``(B, A)`` of one of the matrices."""


@dataclass(frozen=True, eq=False)
class LoraPairs:
    """A `Stack` of two factors each.

    Attributes:
        weights: As `Stack`.
        a: (n, rank, columns); a view of the flat values, as is `b`, (n, rows, rank).
        b: See `a`.
        slope_a: The same places in the flat gradients.
        slope_b: See `slope_a`.
    """

    weights: tuple[Matrix, ...]
    a: Tensor
    b: Tensor
    slope_a: Tensor
    slope_b: Tensor

    def chunks(self) -> Iterator[slice]:
        """As `Stack`."""
        return _chunks(len(self.weights), self.b.shape[1] * self.a.shape[2])

    def changes(self, chunk: slice) -> Tensor:
        """As `Stack`."""
        return torch.bmm(self.b[chunk], self.a[chunk])

    def accumulate_gradients(self, chunk: slice, slopes: Tensor) -> None:
        """As `Stack`: ``∂A = Bᵀ ∂W``, ``∂B = ∂W Aᵀ``."""
        self.slope_a[chunk].baddbmm_(self.b[chunk].transpose(1, 2), slopes)
        self.slope_b[chunk].baddbmm_(slopes, self.a[chunk].transpose(1, 2))

    def draw(self, generator: torch.Generator) -> None:
        """As `Stack`: B is zero and A uniform."""
        self.a.copy_(torch.rand(self.a.shape, generator=generator).mul_(2).sub_(1).div_(math.sqrt(self.a.shape[2])))
        self.b.zero_()

    def begin_with(self, place: int, left: Tensor, right: Tensor) -> None:
        """As `Stack`: B is continued with zeros."""
        _refuse_higher(self.weights[place].name, len(right), self.a.shape[1])
        self.a[place, : len(right)] = right.to(self.a)
        self.b[place, :, : len(right)] = left.to(self.b)

    def multiply(self, scale: float) -> None:
        """As `Stack`."""
        self.b.mul_(scale)

    def pair(self, place: int) -> Pair:
        """As `Stack`; views."""
        return self.b[place], self.a[place]


@dataclass(frozen=True, eq=False)
class LoraPairsBeside(LoraPairs):
    """Pairs that act beside their modules, as PEFT's do: neither product nor gradient by the weight is ever formed."""

    def attach(self) -> None:
        """Add ``B A x`` to what each module gives, from now on and in copies of the module made from now on."""
        for place, weight in enumerate(self.weights):
            add_product(weight.slot.module, self.a[place], self.b[place], self.slope_a[place], self.slope_b[place])

    def chunks(self) -> Iterator[slice]:
        """As `Stack`: nothing is put into a weight."""
        return iter(())


def acts_beside(matrix: Matrix, rank: int) -> bool:
    """Whether a pair acts beside its module rather than inside its weight.

    Inside, each token costs the gradient by the weight, and a weight of 16 bits swallows most of a small change. Beside
    it, each token costs three products with either factor.
    """
    plain = matrix.kind is Kind.LINEAR and not matrix.transposed and type(matrix.slot.module) is nn.Linear
    if not plain or matrix.shape != matrix.slot.shape:
        return False
    rows, columns = matrix.shape
    return rank < min(rows, columns) and (
        matrix.slot.dtype.itemsize < _WIDE_BYTES or _PRODUCTS * rank * (rows + columns) < rows * columns
    )


@dataclass(frozen=True, eq=False)
class FullDeltas:
    """A `Stack` of changes that move as a whole.

    Attributes:
        weights: As `Stack`.
        change: (n, rows, columns); a view of the flat values.
        slope: The same place in the flat gradients.
    """

    weights: tuple[Matrix, ...]
    change: Tensor
    slope: Tensor

    def chunks(self) -> Iterator[slice]:
        """As `Stack`."""
        return _chunks(len(self.weights), self.change[0].numel())

    def changes(self, chunk: slice) -> Tensor:
        """As `Stack`."""
        return self.change[chunk]

    def accumulate_gradients(self, chunk: slice, slopes: Tensor) -> None:
        """As `Stack`."""
        self.slope[chunk] += slopes

    def draw(self, generator: torch.Generator) -> None:
        """As `Stack`; nothing is drawn."""
        self.change.zero_()

    def begin_with(self, place: int, left: Tensor, right: Tensor) -> None:
        """As `Stack`."""
        _refuse_higher(self.weights[place].name, len(right), min(self.change.shape[1:]))
        self.change[place] = (left.float() @ right.float()).to(self.change)

    def multiply(self, scale: float) -> None:
        """As `Stack`."""
        self.change.mul_(scale)

    def pair(self, place: int) -> Pair:
        """As `Stack`."""
        return full_rank_pair(self.change[place])


def _chunks(count: int, entries: int) -> Iterator[slice]:
    return slices(count, max(1, _CHUNK_BYTES // (4 * entries)))


def _refuse_higher(hub_name: str, found: int, rank: int) -> None:
    if found > rank:
        raise UsageError(
            f"the start has rank {found} for {hub_name}, the adapter is to have {rank}", f"Ask for rank {found} or more"
        )


def add_product(module: nn.Module, a: Tensor, b: Tensor, slope_a: Tensor, slope_b: Tensor) -> None:
    """Let a module give ``W x + B A x``, and backward passes add to the gradients of A and B.

    Copies of the module that are made afterwards do so, too.

    Args:
        module: A linear module.
        a: Float32, (rank, columns); read anew at each call.
        b: Float32, (rows, rank).
        slope_a: Where the gradient of A is added up, (rank, columns).
        slope_b: The same of B, (rows, rank).
    """
    anchor = torch.zeros((), device=a.device, requires_grad=True)  # inputs of the first layer need no gradient

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        product: Tensor = _Product.apply(inputs[0], (a, b), (slope_a, slope_b), anchor)  # type: ignore[no-untyped-call]
        return output + product

    module.register_forward_hook(hook)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, states: Tensor, pair: Pair, slopes: Pair, anchor: Tensor) -> Tensor:
        down, up = (factor.to(states.dtype) for factor in pair)
        inner = states @ down.T
        context.save_for_backward(states, inner)
        context.factors = down, up, *slopes
        return inner @ up.T

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        states, inner = context.saved_tensors
        down, up, slope_a, slope_b = context.factors
        slope = slopes[0]
        slope_b.add_(slope.flatten(0, -2).T @ inner.flatten(0, -2))
        of_inner = slope @ up
        slope_a.add_(of_inner.flatten(0, -2).T @ states.flatten(0, -2))
        return of_inner @ down if context.needs_input_grad[0] else None, None, None, None
