"""The LoRA pairs of a student on two flat buffers: values and gradients.

Where that is cheaper, or the weights have 16 bits, pairs act beside their modules. Elsewhere a layer runs with
``W + BA`` in the place of ``W``, so that a step costs what full training costs, whatever the rank, and the gradients of
the factors follow from the gradient by the weight. Flat buffers make the optimiser's step, the sum over processes and
the checkpoint one operation each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from moe_svd_distill.streaming import Matrix
from moe_svd_distill.training.lora_pairs import (
    FULL_DELTA_RATE,
    Block,
    FullDeltas,
    LoraPairs,
    LoraPairsBeside,
    Pair,
    Stack,
    acts_beside,
)

_Group = tuple[int, tuple[Matrix, ...], int, tuple[int, int]]
"""Layer, matrices of one shape and one way of acting in it, rank, and (rows, columns)."""


class LoraParameters:
    """All pairs that are trained.

    Attributes:
        values: Flat float32.
        gradient: Flat float32, of the same length.
        names: Hub names in order.
        blocks: What lies in the flat buffers, in order: first the changes that move as a whole, then pairs.
    """

    def __init__(
        self,
        weights: Mapping[int, Sequence[Matrix]],
        ranks: Mapping[str, int],
        device: torch.device,
        start: Mapping[str, Pair],
        seed: int,
    ) -> None:
        """Begin with the given pairs, and with pairs that change nothing (B zero, A as PEFT draws it) elsewhere.

        What acts beside its module does so in copies of the layers that are made from now on.

        Args:
            weights: Layer to the matrices that can be trained.
            ranks: Hub name to rank; a matrix without one is not trained. Ranks above the smaller side are cut to it.
            device: Where the buffers lie.
            start: Hub name to pair, of lower rank perhaps; its product is kept exactly.
            seed: Of the A matrices.

        Raises:
            UsageError: A start has a higher rank than its matrix is to have.
        """
        groups = [group for layer, of_layer in sorted(weights.items()) for group in _alike(layer, of_layer, ranks)]
        groups.sort(key=lambda group: not _is_whole(group))
        self.blocks: list[Block] = []
        of_group: list[tuple[Block, ...]] = []
        for group in groups:
            of_group.append(tuple(self._place(group)))
        total = self.blocks[-1].end if self.blocks else 0
        self.values = torch.zeros(total, device=device)
        self.gradient = torch.zeros(total, device=device)
        self._stacks: dict[int, list[Stack]] = {}
        for (layer, members, _, _), blocks in zip(groups, of_group, strict=True):
            views = [block.of(flat) for flat in (self.values, self.gradient) for block in blocks]
            stack = _stack(members, views)
            self._stacks.setdefault(layer, []).append(stack)
        generator = torch.Generator().manual_seed(seed)
        for stack in self._all():
            stack.draw(generator)
            for place, weight in enumerate(stack.weights):
                if weight.name in start:
                    stack.begin_with(place, *start[weight.name])
        self._where = {
            weight.name: (stack, place) for stack in self._all() for place, weight in enumerate(stack.weights)
        }
        self.names = list(self._where)
        for stack in self._all():
            if isinstance(stack, LoraPairsBeside):
                stack.attach()

    def stacks(self, layer: int) -> Sequence[Stack]:
        """The stacks of a layer."""
        return self._stacks.get(layer, ())

    def bases(self, layer: int) -> list[list[Tensor]]:
        """Copies of a layer's trained matrices as they are now, for `compose`."""
        return [
            [] if isinstance(stack, LoraPairsBeside) else [weight.value.clone() for weight in stack.weights]
            for stack in self.stacks(layer)
        ]

    @torch.no_grad()
    def compose(self, layer: int, bases: Sequence[Sequence[Tensor]] | None = None) -> None:
        """Put ``W + BA`` in the place of W in a layer that is in memory.

        Args:
            layer: Its number.
            bases: W, from `bases`; None where W itself lies there.
        """
        for number, stack in enumerate(self.stacks(layer)):
            for chunk in stack.chunks():
                base = None if bases is None else bases[number][chunk]
                for place, (weight, change) in enumerate(zip(stack.weights[chunk], stack.changes(chunk), strict=True)):
                    old = weight.value if base is None else base[place]
                    weight.value.copy_(change + old)

    def hook_gradients(self, layer: int) -> None:
        """Let backward passes through a layer add what follows from a weight's gradient to those of its factors.

        Each weight's gradient is let go of at once, so no more than one is there at a time. That holds as long as the
        layer's parameters do: for good in memory, until it is left where layers come and go.
        """
        of_parameter: dict[nn.Parameter, list[Stack]] = defaultdict(list)
        for stack in self.stacks(layer):
            if isinstance(stack, LoraPairsBeside):
                continue
            of_parameter[stack.weights[0].parameter].append(stack)
        for parameter, stacks in of_parameter.items():
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(partial(self._take, stacks))  # type: ignore[no-untyped-call]

    def _take(self, stacks: Sequence[Stack], parameter: Tensor) -> None:
        for stack in stacks:
            self._learn(stack)
        parameter.grad = None

    @torch.no_grad()
    def _learn(self, stack: Stack) -> None:
        for chunk in stack.chunks():
            found = [gradient for weight in stack.weights[chunk] if (gradient := weight.gradient) is not None]
            slopes = found[0][None] if len(found) == 1 else torch.stack(found)
            stack.accumulate_gradients(chunk, slopes.to(self.values.dtype))

    def reset_to_zero(self) -> None:
        """Let every product be zero, as without a start."""
        for stack in self._all():
            stack.multiply(0.0)

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Every product times a number, for a while."""
        before = self.values.clone()
        for stack in self._all():
            stack.multiply(scale)
        try:
            yield
        finally:
            self.values.copy_(before)

    def pair(self, hub_name: str) -> Pair:
        """``(B, A)`` of a matrix."""
        stack, place = self._where[hub_name]
        return stack.pair(place)

    def _all(self) -> Iterator[Stack]:
        for layer in sorted(self._stacks):
            yield from self._stacks[layer]

    def _place(self, group: _Group) -> Iterator[Block]:
        """Where a group lies in the flat buffers: its A and B, or its changes."""
        _, members, rank, (rows, columns) = group
        shapes = [(rows, columns, FULL_DELTA_RATE)] if _is_whole(group) else [(rank, columns, 1.0), (rows, rank, 1.0)]
        for height, width, rate in shapes:
            begin = self.blocks[-1].end if self.blocks else 0
            block = Block(begin, len(members), height, width, rate)
            self.blocks.append(block)
            yield block


def _alike(layer: int, weights: Sequence[Matrix], ranks: Mapping[str, int]) -> Iterator[_Group]:
    """The trained matrices of a layer, those of one shape, rank and parameter together."""
    alike: dict[tuple[tuple[int, int], int, str], list[Matrix]] = defaultdict(list)
    for weight in weights:
        if weight.name in ranks:
            rows, columns = weight.shape
            rank = min(ranks[weight.name], rows, columns)
            alike[(rows, columns), rank, weight.slot.name].append(weight)
    for (shape, rank, _), members in alike.items():
        yield layer, tuple(members), rank, shape


def _stack(members: tuple[Matrix, ...], views: Sequence[Tensor]) -> Stack:
    if len(views) == 2:
        return FullDeltas(members, *views)
    a, b, slope_a, slope_b = views
    kind = LoraPairsBeside if acts_beside(members[0], a.shape[1]) else LoraPairs
    return kind(members, a, b, slope_a, slope_b)


def _is_whole(group: _Group) -> bool:
    _, _, rank, shape = group
    return rank == min(shape)
