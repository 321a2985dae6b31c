"""The LoRA pairs of a student on two flat buffers: values and gradients.

A layer runs with ``W + BA`` in the place of ``W``, so that a step costs what full training costs, whatever the rank,
and the gradients of the factors follow from the gradient by the weight: ``∂A = Bᵀ ∂W``, ``∂B = ∂W Aᵀ``. Pairs of one
shape in one layer (experts) are stacked, so that one batched product serves all. Flat buffers make the optimiser's
step, the sum over processes and the checkpoint one operation each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_svd_distill.errors import UsageError
from moe_svd_distill.streaming import LayerWeight

_CHUNK_BYTES = 256 << 20

Pair = tuple[Tensor, Tensor]
"""``(B, A)`` with (rows, rank) and (rank, columns)."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Pairs of one shape in one layer.

    Attributes:
        weights: Where their products go.
        a: (n, rank, columns); a view of the flat values, as is `b`, (n, rows, rank).
        b: See `a`.
        slope_a: The same places in the flat gradients.
        slope_b: See `slope_a`.
    """

    weights: tuple[LayerWeight, ...]
    a: Tensor
    b: Tensor
    slope_a: Tensor
    slope_b: Tensor

    def chunks(self) -> Iterator[slice]:
        """Ranges of pairs whose products take a bounded amount of memory together."""
        one = 4 * self.b.shape[1] * self.a.shape[2]
        step = max(1, _CHUNK_BYTES // one)
        for begin in range(0, len(self.weights), step):
            yield slice(begin, min(begin + step, len(self.weights)))


class FactorBank:
    """All pairs that are trained.

    Attributes:
        values: Flat float32.
        gradient: Flat float32, of the same length.
        names: Hub names in order.
        blocks: Beginning, end and shape (n, rows, columns) of every stack of factors in the flat buffers.
    """

    def __init__(
        self,
        weights: Mapping[int, Sequence[LayerWeight]],
        ranks: Mapping[str, int],
        device: torch.device,
        start: Mapping[str, Pair],
        seed: int,
    ) -> None:
        """Begin with the given pairs, and with pairs that change nothing (B zero, A as PEFT draws it) elsewhere.

        A start of lower rank is kept exactly: its B is continued with zeros.

        Args:
            weights: Layer to the matrices that can be trained.
            ranks: Hub name to rank; a matrix without one is not trained. Ranks above the smaller side are cut to it.
            device: Where the buffers lie.
            start: Hub name to pair.
            seed: Of the A matrices.

        Raises:
            UsageError: A start has a higher rank than its matrix is to have.
        """
        self._stacks: dict[int, list[Stack]] = {}
        grouped: list[tuple[int, tuple[LayerWeight, ...], int, tuple[int, int]]] = []
        total = 0
        for layer, of_layer in sorted(weights.items()):
            alike: dict[tuple[tuple[int, int], int, str], list[LayerWeight]] = defaultdict(list)
            for weight in of_layer:
                if weight.hub_name in ranks:
                    rows, columns = weight.value.shape
                    rank = min(ranks[weight.hub_name], rows, columns)
                    alike[(rows, columns), rank, weight.place.name].append(weight)
            for (shape, rank, _), members in alike.items():
                grouped.append((layer, tuple(members), rank, shape))
                total += len(members) * rank * sum(shape)
        self.values = torch.zeros(total, device=device)
        self.gradient = torch.zeros(total, device=device)
        self.blocks: list[tuple[int, int, tuple[int, int, int]]] = []
        begin = 0
        for layer, stacked, rank, (rows, columns) in grouped:
            middle = begin + len(stacked) * rank * columns
            end = middle + len(stacked) * rows * rank
            views = [
                flat[first:last].view(len(stacked), *shape)
                for flat in (self.values, self.gradient)
                for first, last, shape in ((begin, middle, (rank, columns)), (middle, end, (rows, rank)))
            ]
            self.blocks.append((begin, middle, (len(stacked), rank, columns)))
            self.blocks.append((middle, end, (len(stacked), rows, rank)))
            self._stacks.setdefault(layer, []).append(Stack(stacked, *views))
            begin = end
        self._fill(start, seed)
        self.names = [weight.hub_name for stack in self._all() for weight in stack.weights]

    def stacks(self, layer: int) -> Sequence[Stack]:
        """The stacks of a layer."""
        return self._stacks.get(layer, ())

    def bases(self, layer: int) -> list[list[Tensor]]:
        """Copies of a layer's trained matrices as they are now, for `compose`."""
        return [[weight.value.clone() for weight in stack.weights] for stack in self.stacks(layer)]

    @torch.no_grad()
    def compose(self, layer: int, bases: Sequence[Sequence[Tensor]] | None = None) -> None:
        """Put ``W + BA`` in the place of W in a layer that is in memory.

        Args:
            layer: Its number.
            bases: W, from `bases`; None where W itself lies there.
        """
        for number, stack in enumerate(self.stacks(layer)):
            for chunk in stack.chunks():
                change = torch.bmm(stack.b[chunk], stack.a[chunk])
                base = None if bases is None else bases[number][chunk]
                for place, (weight, delta) in enumerate(zip(stack.weights[chunk], change, strict=True)):
                    old = weight.value if base is None else base[place]
                    weight.value.copy_(delta.add_(old))

    def require_gradients(self, layer: int) -> None:
        """Let a backward pass through a layer leave gradients in its parameters, and forget earlier ones."""
        for stack in self.stacks(layer):
            for weight in stack.weights:
                weight.parameter.requires_grad_(True)
                weight.parameter.grad = None

    @torch.no_grad()
    def collect(self, layer: int) -> None:
        """Turn the gradients by a layer's weights into those of its factors, and let go of the former."""
        for stack in self.stacks(layer):
            for chunk in stack.chunks():
                found = [weight.gradient for weight in stack.weights[chunk]]
                slope = (found[0][None] if len(found) == 1 else torch.stack(found)).to(self.values.dtype)
                torch.bmm(stack.b[chunk].transpose(1, 2), slope, out=stack.slope_a[chunk])
                torch.bmm(slope, stack.a[chunk].transpose(1, 2), out=stack.slope_b[chunk])
        for stack in self.stacks(layer):
            for weight in stack.weights:
                weight.parameter.grad = None

    def forget(self) -> None:
        """Let every product be zero, as without a start."""
        for stack in self._all():
            stack.b.zero_()

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Every product times a number, for a while."""
        before = self.values.clone()
        for stack in self._all():
            stack.b.mul_(scale)
        try:
            yield
        finally:
            self.values.copy_(before)

    def pair(self, hub_name: str) -> Pair:
        """``(B, A)`` of a matrix, as views."""
        for stack in self._all():
            for place, weight in enumerate(stack.weights):
                if weight.hub_name == hub_name:
                    return stack.b[place], stack.a[place]
        raise KeyError(hub_name)

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """Every hub name and its pair, as views."""
        for stack in self._all():
            for place, weight in enumerate(stack.weights):
                yield weight.hub_name, (stack.b[place], stack.a[place])

    def _all(self) -> Iterator[Stack]:
        for layer in sorted(self._stacks):
            yield from self._stacks[layer]

    def _fill(self, start: Mapping[str, Pair], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for stack in self._all():
            count, rank, columns = stack.a.shape
            drawn = torch.rand(count, rank, columns, generator=generator).mul_(2).sub_(1).div_(math.sqrt(columns))
            stack.a.copy_(drawn)
            for place, weight in enumerate(stack.weights):
                if weight.hub_name in start:
                    left, right = start[weight.hub_name]
                    if len(right) > rank:
                        raise UsageError(
                            f"the start has rank {len(right)} for {weight.hub_name}, the adapter is to have {rank}",
                            f"Ask for rank {len(right)} or more",
                        )
                    stack.a[place, : len(right)] = right.to(stack.a)
                    stack.b[place, :, : len(right)] = left.to(stack.b)
