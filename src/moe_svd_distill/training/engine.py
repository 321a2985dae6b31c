"""Forward and backward through a decoder whose layers carry trained pairs: in memory, or layer after layer.

In memory every batch goes through all layers and back. Streamed, all batches of a step go through one layer before the
next is read; what went into each layer is kept, and on the way back each layer is read and computed once more, this
time with gradients. Both give the same sums, to rounding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moe_svd_distill.streaming.budget import activation_budget
from moe_svd_distill.streaming.decoder import Decoder
from moe_svd_distill.training.factors import FactorBank
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.text import Batch


class Engine(Protocol):
    """Runs the student as it is now."""

    def learn(self, batches: Sequence[Batch], head: TrainedHead, places: int) -> None:
        """Add the gradients of a step to those in the factors' bank and in the head.

        Args:
            batches: Sequences that go through a layer together, batch by batch.
            head: The loss.
            places: Places of the whole step, over which the loss is a mean.
        """

    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """The final states at the places of each batch, (b, d)."""


class ResidentEngine:
    """An `Engine` for a decoder in memory."""

    def __init__(self, decoder: Decoder, bank: FactorBank) -> None:
        self._decoder, self._bank = decoder, bank
        self._bases = [bank.bases(layer) for layer in range(decoder.layers)]
        for layer in range(decoder.layers):
            bank.collect(layer)

    def learn(self, batches: Sequence[Batch], head: TrainedHead, places: int) -> None:
        """As `Engine`."""
        self._compose()
        for batch in batches:
            with torch.enable_grad():
                states = self._through(batch).flatten(0, 1)[batch.position]
            torch.autograd.backward(states, head.learn(states.detach(), batch, places).to(states.dtype))

    @torch.no_grad()
    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """As `Engine`."""
        self._compose()
        for batch in batches:
            yield self._through(batch).flatten(0, 1)[batch.position]

    def _compose(self) -> None:
        for layer, bases in enumerate(self._bases):
            self._bank.compose(layer, bases)

    def _through(self, batch: Batch) -> Tensor:
        states = self._decoder.embed(batch.ids)
        for layer in range(self._decoder.layers):
            states = self._decoder.run(layer, states)
        return self._decoder.finish(states)


class StreamedEngine:
    """An `Engine` for a decoder of which a layer is in memory at a time."""

    def __init__(self, decoder: Decoder, bank: FactorBank, folder: Path, budget: int | None = None) -> None:
        """Nothing is read yet.

        Args:
            decoder: The student's.
            bank: Its pairs.
            folder: Where the inputs of layers lie while they take more memory than the budgets.
            budget: Bytes on the device, and as many in the machine's memory beside a GPU; by default a quarter of what
                is free in each.
        """
        self._decoder, self._bank, self._folder, self._budget = decoder, bank, folder, budget

    def learn(self, batches: Sequence[Batch], head: TrainedHead, places: int) -> None:
        """As `Engine`."""
        decoder, bank = self._decoder, self._bank
        last = decoder.layers - 1
        with _Inputs(self._folder, decoder.device, self._budget) as kept:
            states = [decoder.embed(batch.ids) for batch in batches]
            for layer in range(last):
                self._enter(layer, layer + 1)
                for number in range(len(batches)):
                    kept.put(layer, number, states[number])
                    with torch.no_grad():
                        states[number] = decoder.run(layer, states[number])
            slopes: list[Tensor] = []
            for layer in range(last, -1, -1):
                self._enter(layer, layer - 1 if layer else None)
                bank.collect(layer)
                for number, batch in enumerate(batches):
                    before = states[number] if layer == last else kept.take(layer, number).to(decoder.device)
                    before = before.detach().requires_grad_(layer > 0)
                    with torch.enable_grad():
                        after = decoder.run(layer, before)
                        if layer == last:
                            after = decoder.finish(after).flatten(0, 1)[batch.position]
                            slopes.append(head.learn(after.detach(), batch, places).to(after.dtype))
                    torch.autograd.backward(after, slopes[number])
                    if layer:
                        assert before.grad is not None
                        slopes[number] = before.grad
                decoder.leave(layer)

    @torch.no_grad()
    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """As `Engine`."""
        states = [self._decoder.embed(batch.ids) for batch in batches]
        for layer in range(self._decoder.layers):
            self._enter(layer, layer + 1 if layer + 1 < self._decoder.layers else None)
            states = [self._decoder.run(layer, each) for each in states]
            self._decoder.leave(layer)
        for batch, each in zip(batches, states, strict=True):
            yield self._decoder.finish(each).flatten(0, 1)[batch.position]

    def _enter(self, layer: int, following: int | None) -> None:
        self._decoder.enter(layer, following)
        self._bank.compose(layer)


class _Inputs:
    """What went into each layer, batch by batch: on the device, in memory, or in a file that goes when this closes."""

    def __init__(self, folder: Path, device: torch.device, budget: int | None) -> None:
        self._folder = folder
        self._left = {name: left if budget is None else budget for name, left in _free(device).items()}
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def put(self, layer: int, number: int, states: Tensor) -> None:
        """Keep the input of a layer."""
        size = states.numel() * states.element_size()
        for device, left in self._left.items():
            if size <= left:
                self._left[device] -= size
                self._kept[layer, number] = states.detach().to(device)
                return
        if self._scratch is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._scratch = tempfile.TemporaryDirectory(prefix="inputs-", dir=self._folder)
        path = Path(self._scratch.name) / f"{layer}-{number}"
        mapped = torch.from_file(str(path), shared=True, size=states.numel(), dtype=states.dtype)
        mapped.copy_(states.detach().reshape(-1))
        self._kept[layer, number] = mapped.view(states.shape)

    def take(self, layer: int, number: int) -> Tensor:
        """Hand it out for good."""
        return self._kept.pop((layer, number))

    def __enter__(self) -> _Inputs:
        return self

    def __exit__(self, *error: object) -> None:
        self._kept.clear()
        if self._scratch is not None:
            self._scratch.cleanup()


def _free(device: torch.device) -> dict[torch.device, int]:
    """Bytes that the inputs of layers may take, on a GPU first and then in the machine's memory."""
    machine = {torch.device("cpu"): activation_budget()}
    return machine if device.type == "cpu" else {device: activation_budget(device)} | machine
