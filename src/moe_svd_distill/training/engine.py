"""Forward and backward through a decoder whose layers carry trained pairs: in memory, or layer after layer.

Training begins at any layer, on what a pass has recorded there; behind the last one only the head is left to train.
In memory every batch goes through all layers and back. Streamed, all batches of a step go through one layer before the
next is read; what went into each layer is kept, and on the way back each layer is read and computed once more, this
time with gradients. Both give the same sums, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moe_svd_distill.streaming.decoder import Decoder
from moe_svd_distill.streaming.states_file import KeptInputs
from moe_svd_distill.training.fixed_head import FixedHead
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.lora_parameters import LoraParameters
from moe_svd_distill.training.text import Batch


class Engine(Protocol):
    """Runs the student as it is now.

    Attributes:
        bank: The factors in its layers.
    """

    bank: LoraParameters

    def accumulate_gradients(self, batches: Sequence[Batch], head: TrainedHead | FixedHead, places: int) -> None:
        """Add the gradients of a step to those in the factors' bank and in the head.

        Args:
            batches: Sequences that go through a layer together, batch by batch.
            head: The loss.
            places: Places of the whole step, over which the loss is a mean.
        """

    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """The final states at the places of each batch, (b, d)."""


class HeadEngine:
    """An `Engine` without layers: what was recorded are the final states."""

    def __init__(self, bank: LoraParameters) -> None:
        self.bank = bank

    def accumulate_gradients(self, batches: Sequence[Batch], head: TrainedHead | FixedHead, places: int) -> None:
        """As `Engine`."""
        for batch, states in zip(batches, self.states(batches), strict=True):
            head.accumulate_gradients(states, batch, places)

    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """As `Engine`."""
        for batch in batches:
            yield batch.inputs[0].flatten(0, 1)[batch.position].float()


class ResidentEngine:
    """An `Engine` for a decoder whose layers from one on are in memory."""

    def __init__(self, decoder: Decoder, bank: LoraParameters, first: int = 0) -> None:
        self._decoder, self.bank, self._first = decoder, bank, first
        self._bases = {layer: bank.bases(layer) for layer in range(first, decoder.layers)}
        for layer in self._bases:
            bank.hook_gradients(layer)

    def accumulate_gradients(self, batches: Sequence[Batch], head: TrainedHead | FixedHead, places: int) -> None:
        """As `Engine`."""
        self._compose()
        for batch in batches:
            with torch.enable_grad():
                states = self._states(batch)
            torch.autograd.backward(states, head.accumulate_gradients(states.detach(), batch, places).to(states.dtype))

    @torch.no_grad()
    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """As `Engine`."""
        self._compose()
        for batch in batches:
            yield self._states(batch)

    def _states(self, batch: Batch) -> Tensor:
        return self._decoder.states(batch.ids, self._first, batch.inputs).flatten(0, 1)[batch.position]

    def _compose(self) -> None:
        for layer, bases in self._bases.items():
            self.bank.compose(layer, bases)


class StreamedEngine:
    """An `Engine` for a decoder of which a layer is in memory at a time."""

    def __init__(
        self, decoder: Decoder, bank: LoraParameters, folder: Path, first: int = 0, budget: int | None = None
    ) -> None:
        """Nothing is read yet.

        Args:
            decoder: The student's.
            bank: Its pairs.
            folder: Where what layers are given lies while it takes more memory than the budgets.
            first: The layer to begin at.
            budget: Bytes on the device, and as many in the machine's memory beside a GPU; by default a quarter of what
                is free in each.
        """
        self._decoder, self.bank, self._folder, self._budget = decoder, bank, folder, budget
        self._first = first

    def accumulate_gradients(self, batches: Sequence[Batch], head: TrainedHead | FixedHead, places: int) -> None:
        """As `Engine`."""
        decoder = self._decoder
        with KeptInputs(self._folder, decoder.device, self._budget) as kept:
            self._forward(batches, kept)
            slopes: list[list[Tensor | None]] = [[] for _ in batches]
            for layer in range(decoder.layers - 1, self._first - 1, -1):
                self._enter(layer, layer - 1 if layer > self._first else None)
                self.bank.hook_gradients(layer)
                for number, batch in enumerate(batches):
                    before = [
                        tensor.to(decoder.device).detach().requires_grad_(tensor.is_floating_point())
                        for tensor in kept.take(layer, number)
                    ]
                    with torch.enable_grad():
                        given = [tensor.clone() for tensor in before]  # a layer may write into it
                        if layer + 1 < decoder.layers:
                            after = decoder.step(layer, batch.ids, given)
                        else:
                            after = [decoder.states(batch.ids, layer, given).flatten(0, 1)[batch.position]]
                            slopes[number] = [
                                head.accumulate_gradients(after[0].detach(), batch, places).to(after[0].dtype)
                            ]
                    pairs = zip(after, slopes[number], strict=True)
                    wanted = [(value, slope) for value, slope in pairs if slope is not None and value.requires_grad]
                    torch.autograd.backward([value for value, _ in wanted], [slope for _, slope in wanted])
                    slopes[number] = [tensor.grad for tensor in before]
                decoder.leave(layer)

    @torch.no_grad()
    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """As `Engine`."""
        last = self._decoder.layers - 1
        given = self._forward(batches)
        self._enter(last, None)
        states = [
            self._decoder.states(batch.ids, last, recorded) for batch, recorded in zip(batches, given, strict=True)
        ]
        self._decoder.leave(last)
        for batch, each in zip(batches, states, strict=True):
            yield each.flatten(0, 1)[batch.position]

    @torch.no_grad()
    def _forward(self, batches: Sequence[Batch], kept: KeptInputs | None = None) -> list[list[Tensor]]:
        """All layers but the last; returns what that one is given for each batch, and keeps it for every layer."""
        given: list[list[Tensor]] = [list(batch.inputs) for batch in batches]
        for layer in range(self._first, self._decoder.layers):
            if kept is not None:
                for number, recorded in enumerate(given):
                    kept.put(layer, number, recorded)
            if layer + 1 == self._decoder.layers:
                break
            self._enter(layer, layer + 1)
            for number, batch in enumerate(batches):
                given[number] = self._decoder.step(layer, batch.ids, [tensor.clone() for tensor in given[number]])
            self._decoder.leave(layer)
        return given

    def _enter(self, layer: int, following: int | None) -> None:
        self._decoder.enter(layer, following)
        self.bank.compose(layer)
