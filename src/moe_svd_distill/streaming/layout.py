"""What has to be recorded at each gate so that a decoder can go on from there: found by trying, not declared.

A value at a gate either follows from the token ids alone, then it is computed again whenever it is needed; or it
depends on what layers have returned or left in containers, then it is carried from gate to gate. Runs on different
placeholders in place of all layers tell them apart. Runs on one and on two sequences tell which dimension of a carried
tensor counts the sequences, so that it can be stored sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming.carried import NOTHING, Gate, RowShape, Structure, changed, flatten
from moe_svd_distill.streaming.gates import Call, GatedDecoder, Reached


class GateLayout:
    """What is known so far about the outputs of layers and about what passes the gates.

    Each gate is learnt once, on the first batch; other threads wait for that.
    """

    def __init__(self, name: str, layers: int) -> None:
        self._name, self._layers = name, layers
        self._outputs: list[Structure] = []
        self._gates: list[Future[Gate]] = [Future() for _ in range(layers)]
        self._gates[0].set_result(NOTHING)

    def gate(self, index: int) -> Gate:
        """What passes a gate, once it is known."""
        return self._gates[index].result()

    def states(self, decoder: GatedDecoder, ids: Tensor, begin: int, recorded: Sequence[Tensor]) -> Tensor:
        """Run all layers from a gate on; what was recorded there (rows, …) to final states (rows, length, d)."""
        gate = self.gate(begin)
        found = decoder.run(ids, begin, self._layers, self._placeholder(ids), lambda call: gate.put(call, recorded))
        assert isinstance(found, Tensor)
        return found

    def step(
        self, decoder: GatedDecoder, ids: Tensor, index: int, recorded: Sequence[Tensor], *, learn: bool | None = None
    ) -> list[Tensor]:
        """Run one layer that is not the last; what was recorded at its gate to what is recorded at the next.

        Args:
            decoder: With the layer.
            ids: Token ids (rows, length).
            index: The layer.
            recorded: Of these sequences, (rows, …).
            learn: Whether to find out what passes the next gate; by default if it is not known yet.

        Raises:
            IncompatiblePairError: The decoder does something that cannot be carried.
        """
        learn = not self._gates[index + 1].done() if learn is None else learn
        try:
            reached = self._step(decoder, ids, index, recorded)
            if learn:
                with torch.no_grad():
                    self._gates[index + 1].set_result(self._learn(decoder, ids, index, recorded, reached))
        except BaseException as error:
            if learn:
                self._gates[index + 1].set_exception(error)  # other threads may be waiting for it
            raise
        return self.gate(index + 1).take(reached.call, len(ids))

    def encode(self, index: int) -> Mapping[str, Any]:
        """All that another process needs to go on from a gate, for JSON."""
        return self.gate(index).encode() | {"outputs": [output.encode() for output in self._outputs[:index]]}

    def decode(self, index: int, found: Any) -> None:
        """Take over what another process has learnt up to a gate."""
        self._outputs = [Structure.decode(output) for output in found["outputs"]]
        self._gates[index].set_result(Gate.decode(found))

    def _step(self, decoder: GatedDecoder, ids: Tensor, index: int, recorded: Sequence[Tensor]) -> Reached:
        gate = self.gate(index)
        found = decoder.run(ids, index, index + 1, self._placeholder(ids), lambda call: gate.put(call, recorded))
        assert isinstance(found, Reached)
        return found

    def _placeholder(self, ids: Tensor, noise: bool = False) -> Callable[[int], Any]:
        """Zeros or noise in place of the outputs of layers, without memory for more than their last dimension."""
        generator = torch.Generator().manual_seed(0)

        def value(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if noise and dtype.is_floating_point:
                return torch.randn(shape[-1:], generator=generator).to(ids.device, dtype).expand(shape)
            return torch.full((), int(noise), dtype=dtype, device=ids.device).expand(shape)

        return lambda index: self._outputs[index].filled(len(ids), value)

    def _learn(
        self, decoder: GatedDecoder, ids: Tensor, index: int, recorded: Sequence[Tensor], reached: Reached
    ) -> Gate:
        end, rows, before = index + 1, len(ids), self.gate(index)

        @cache
        def trials() -> list[Reached]:
            """The same for one sequence and for two."""
            chosen = [torch.tensor([0]), torch.tensor([0, min(1, rows - 1)])]
            return [
                self._step(decoder, ids[some], index, [tensor[some.to(tensor.device)] for tensor in recorded])
                for some in chosen
            ]

        def learnt(known: Structure | None, part: Callable[[Reached], Any]) -> Structure:
            """The structure of a part: as known where that fits, else from one sequence and two."""
            form, tensors = flatten(part(reached))
            if known is not None and known.fits(form, tensors, rows):
                return known
            one, two = (flatten(part(trial))[1] for trial in trials())
            found = Structure(form, tuple(map(_row_shape, one, two)))
            if len(one) != len(two) or not found.fits(form, tensors, rows):
                raise self._refused("gives a layer something that changes its form with the number of sequences")
            return found

        def arguments(placeholder: Callable[[int], Any]) -> Call:
            """What the next layer is given when no layer runs."""
            found = decoder.run(ids, end, end, placeholder)
            assert isinstance(found, Reached)
            return found.call

        self._outputs.append(learnt(self._outputs[-1] if self._outputs else None, lambda it: it.output))
        noise = self._placeholder(ids, noise=True)
        without = arguments(self._placeholder(ids)), arguments(noise)
        paths = tuple(changed(reached.call, without))
        places = Gate(paths, NOTHING.structure)
        known = before.structure if before.paths == paths else None
        gate = Gate(paths, learnt(known, lambda it: places.values(it.call)))
        if strange := next((shape for shape in gate.structure.shapes if shape.dim is None), None):
            raise self._refused(f"gives layer {end} values of shape {strange.shape} that belong to no sequence")
        # With the same output of this layer, other outputs before it must change nothing but what lies in containers.
        again = arguments(lambda place: reached.output if place == index else noise(place))
        for value, other in zip(gate.values(reached.call), gate.values(again), strict=True):
            (form, tensors), (other_form, others) = flatten(value), flatten(other)
            if form == other_form and not all(map(_same, tensors, others)):
                raise self._refused(f"keeps outputs of layers to itself and uses them behind layer {index}")
        return gate

    def _refused(self, what: str) -> IncompatiblePairError:
        return IncompatiblePairError(f"{self._name} {what}", "Report the architecture to the project")


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one != one)).all())  # what is not a number is reported elsewhere


def _row_shape(one: Tensor, two: Tensor) -> RowShape:
    grown = [dim for dim, (few, more) in enumerate(zip(one.shape, two.shape, strict=False)) if few != more]
    return RowShape(tuple(one.shape), grown[0] if len(grown) == 1 else None, one.dtype)
