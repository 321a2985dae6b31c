"""What has to be recorded at each gate so that a decoder can go on from there: found by trying, not declared.

A value at a gate either follows from the token ids alone, then it is computed again whenever it is needed; or it
depends on what layers have returned or left in containers, then it is carried from gate to gate. Two runs on different
placeholders in place of all layers tell them apart. Runs on one and on two sequences tell which dimension of a carried
tensor counts the sequences, so that it can be stored sequence by sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming.gates import Call, Shell
from moe_svd_distill.streaming.trees import Path, at, changed, flatten, put, unflatten

_ALIGNMENT = 16


@dataclass(frozen=True)
class RowShape:
    """The shape of a tensor by its number of sequences.

    Attributes:
        shape: For one sequence.
        dim: The dimension that grows with the sequences; None where none does.
        dtype: Type of its values.
    """

    shape: tuple[int, ...]
    dim: int | None
    dtype: torch.dtype

    def of(self, rows: int) -> tuple[int, ...]:
        """The shape for a number of sequences."""
        return tuple(size * rows if dim == self.dim else size for dim, size in enumerate(self.shape))

    @property
    def bytes(self) -> int:
        """Of one sequence, with what keeps the next value aligned."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def split(self, tensor: Tensor) -> Tensor:
        """With the sequences as a dimension of their own, in front."""
        assert self.dim is not None
        moved = tensor.movedim(self.dim, 0)
        each = self.shape[self.dim]
        return moved.reshape(len(moved) // each, each, *moved.shape[1:])

    def join(self, tensor: Tensor) -> Tensor:
        """What `split` takes apart."""
        assert self.dim is not None
        return tensor.flatten(0, 1).movedim(0, self.dim)


@dataclass(frozen=True)
class Structure:
    """A tree of tensors without their values.

    Attributes:
        form: All but the tensors, as `flatten` has it.
        shapes: Of the tensors, in order.
    """

    form: Any
    shapes: tuple[RowShape, ...]

    def filled(self, rows: int, value: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> Any:
        """The tree for a number of sequences."""
        return unflatten(self.form, (value(shape.of(rows), shape.dtype) for shape in self.shapes))


@dataclass(frozen=True)
class Gate:
    """What is carried through a gate.

    Attributes:
        paths: Places in a layer's arguments.
        structure: Of the values there, in a tuple.
    """

    paths: tuple[Path, ...]
    structure: Structure

    def take(self, call: Call, rows: int) -> list[Tensor]:
        """What is to be recorded, sequence by sequence: tensors (rows, …).

        Raises:
            IncompatiblePairError: It is something else than for the first batch.
        """
        form, tensors = flatten(tuple(at(call, path) for path in self.paths))
        shapes = self.structure.shapes
        if form != self.structure.form or not _fit(shapes, tensors, rows):
            raise IncompatiblePairError("What a layer is given changes from batch to batch", _REPORT)
        return [shape.split(tensor) for tensor, shape in zip(tensors, shapes, strict=True)]

    def put(self, call: Call, recorded: Sequence[Tensor]) -> Call:
        """A layer's arguments with what was recorded in its places."""
        shapes = self.structure.shapes
        tensors = (shape.join(tensor) for tensor, shape in zip(recorded, shapes, strict=True))
        for path, value in zip(self.paths, unflatten(self.structure.form, tensors), strict=True):
            call = put(call, path, value)
        return call

    def pack(self, recorded: Sequence[Tensor]) -> Tensor:
        """All of it as bytes, (rows, bytes of a sequence)."""
        rows = []
        for tensor, shape in zip(recorded, self.structure.shapes, strict=True):
            flat = tensor.contiguous().flatten(1).view(torch.uint8)
            lacking = shape.bytes - flat.shape[1]
            rows.append(torch.nn.functional.pad(flat, (0, lacking)) if lacking else flat)
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """What `pack` was given, as views."""
        begin, found = 0, []
        for shape in self.structure.shapes:
            assert shape.dim is not None
            size = math.prod(shape.shape) * shape.dtype.itemsize
            moved = [shape.shape[shape.dim], *shape.shape[: shape.dim], *shape.shape[shape.dim + 1 :]]
            found.append(packed[:, begin : begin + size].view(shape.dtype).view(len(packed), *moved))
            begin += shape.bytes
        return found


NOTHING = Gate((), Structure(["tuple", []], ()))
_REPORT = "Report the architecture to the project"


class Layout:
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

    def knows(self, index: int) -> bool:
        """Whether a gate is known."""
        return self._gates[index].done()

    def arguments(self, shell: Shell, ids: Tensor, index: int, recorded: Sequence[Tensor]) -> Call:
        """What a layer is given for a batch."""
        found = shell.run(ids, index, index, self._placeholder(len(ids), ids.device))
        assert isinstance(found, tuple)
        return self.gate(index).put(found, recorded)

    def states(self, shell: Shell, ids: Tensor, begin: int, recorded: Sequence[Tensor]) -> Tensor:
        """Run all layers from a gate on; what was recorded there (rows, …) to final states (rows, length, d)."""
        found = self._run(shell, ids, begin, self._layers, recorded)
        assert isinstance(found, Tensor)
        return found

    def step(
        self, shell: Shell, ids: Tensor, index: int, recorded: Sequence[Tensor], *, learn: bool = False
    ) -> list[Tensor]:
        """Run one layer that is not the last; what was recorded at its gate to what is recorded at the next.

        Args:
            shell: With the layer.
            ids: Token ids (rows, length).
            index: The layer.
            recorded: Of these sequences, (rows, …).
            learn: Whether to find out what passes the next gate.

        Raises:
            IncompatiblePairError: The decoder does something that cannot be carried.
        """
        try:
            call = self._run(shell, ids, index, index + 1, recorded)
            assert isinstance(call, tuple)
            if learn:
                with torch.no_grad():
                    self._learn(shell, ids, index, recorded, call)
        except BaseException as error:
            if learn and not self.knows(index + 1):
                self._gates[index + 1].set_exception(error)  # other threads may be waiting for it
            raise
        finally:
            shell.output = None
        return self.gate(index + 1).take(call, len(ids))

    def encode(self, index: int) -> dict[str, Any]:
        """All that another process needs to go on from a gate, for JSON."""
        gate = self.gate(index)
        return {
            "outputs": [_encode(structure) for structure in self._outputs[:index]],
            "paths": [list(path) for path in gate.paths],
            "values": _encode(gate.structure),
        }

    def decode(self, index: int, found: Any) -> None:
        """Take over what another process has learnt up to a gate."""
        self._outputs = [_decode(structure) for structure in found["outputs"]]
        self._gates[index].set_result(decode_gate(found))

    def _run(self, shell: Shell, ids: Tensor, begin: int, end: int, recorded: Sequence[Tensor]) -> Call | Tensor:
        gate = self.gate(begin)
        return shell.run(
            ids, begin, end, self._placeholder(len(ids), ids.device), lambda call: gate.put(call, recorded)
        )

    def _placeholder(self, rows: int, device: torch.device, seed: int | None = None) -> Callable[[int], Any]:
        def value(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros((), dtype=dtype, device=device).expand(shape)

        def noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            """Another one for each seed; without memory for more than the last dimension."""
            if not dtype.is_floating_point:
                return torch.full((), int(seed or 0), dtype=dtype, device=device).expand(shape)
            return torch.randn(shape[-1:], generator=generator).to(device, dtype).expand(shape)

        generator = torch.Generator().manual_seed(seed or 0)
        return lambda index: self._outputs[index].filled(rows, value if seed is None else noise)

    def _learn(self, shell: Shell, ids: Tensor, index: int, recorded: Sequence[Tensor], call: Call) -> None:
        rows, output, before = len(ids), flatten(shell.output), self.gate(index)

        @cache
        def trials() -> list[tuple[Any, Call]]:
            """The layer's output and the next one's arguments for one sequence and for two."""
            found = []
            for count in (1, 2):
                few = [torch.cat([tensor[:1]] * count) if rows < count else tensor[:count] for tensor in recorded]
                some = torch.cat([ids[:1]] * count) if rows < count else ids[:count]
                reached = self._run(shell, some, index, index + 1, few)
                assert isinstance(reached, tuple)
                found.append((shell.output, reached))
            return found

        known = self._outputs[-1].shapes if self._outputs and self._outputs[-1].form == output[0] else None
        self._outputs.append(self._structure(output, known, rows, lambda: [flatten(trial[0]) for trial in trials()]))
        others = []
        for seed in (0, 1):
            found = shell.run(ids, index + 1, index + 1, self._placeholder(rows, ids.device, seed))
            assert isinstance(found, tuple)
            others.append(found)
        paths = tuple(changed(call, tuple(others)))

        def values(reached: Call) -> tuple[Any, list[Tensor]]:
            return flatten(tuple(at(reached, path) for path in paths))

        here = values(call)
        known = before.structure.shapes if before.paths == paths and before.structure.form == here[0] else None
        structure = self._structure(here, known, rows, lambda: [values(trial[1]) for trial in trials()])
        for shape in structure.shapes:
            if shape.dim is None:
                raise IncompatiblePairError(
                    f"{self._name} gives layer {index + 1} values of shape {shape.shape} that belong to no sequence",
                    _REPORT,
                )
        gate = Gate(paths, structure)
        self._check_nothing_is_kept(shell, ids, index, recorded, output, here, gate)
        self._gates[index + 1].set_result(gate)

    def _check_nothing_is_kept(
        self,
        shell: Shell,
        ids: Tensor,
        index: int,
        recorded: Sequence[Tensor],
        output: tuple[Any, list[Tensor]],
        found: tuple[Any, list[Tensor]],
        gate: Gate,
    ) -> None:
        """With the same output of a layer, other outputs before it must change nothing in what the next one is given."""
        before, layer = self.gate(index), shell.layers[index]
        shell.layers[index] = _Answer(unflatten(output[0], iter(output[1])))
        try:
            noise = self._placeholder(len(ids), ids.device, 1)
            again = shell.run(ids, index, index + 1, noise, lambda call: before.put(call, recorded))
        finally:
            shell.layers[index] = layer
        for path, value in zip(gate.paths, unflatten(found[0], iter(found[1])), strict=True):
            tensors, others = flatten(value), flatten(at(again, path))
            # What layers leave in containers is not there, because none has run.
            if tensors[0] == others[0] and not all(map(torch.equal, tensors[1], others[1])):
                raise IncompatiblePairError(
                    f"{self._name} keeps outputs of layers to itself and uses them behind layer {index}", _REPORT
                )

    def _structure(
        self,
        found: tuple[Any, list[Tensor]],
        known: Sequence[RowShape] | None,
        rows: int,
        trials: Callable[[], list[tuple[Any, list[Tensor]]]],
    ) -> Structure:
        """The structure of a flattened tree: as known before where that fits, else from one sequence and two."""
        form, tensors = found
        if known is None or not _fit(known, tensors, rows):
            one, two = trials()
            same = one[0] == two[0] == form
            known = [_row_shape(*pair) for pair in zip(one[1], two[1], strict=True)] if same else []
            if len(known) != len(tensors) or not _fit(known, tensors, rows):
                raise IncompatiblePairError(
                    f"What {self._name} gives a layer changes its form with the number of sequences", _REPORT
                )
        return Structure(form, tuple(known))


class _Answer(nn.Module):
    """A layer whose output is known."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self._output


def decode_gate(found: Any) -> Gate:
    """The gate of what `Layout.encode` has made."""
    return Gate(tuple(tuple(path) for path in found["paths"]), _decode(found["values"]))


def _fit(shapes: Sequence[RowShape], tensors: Sequence[Tensor], rows: int) -> bool:
    return all(
        shape.of(rows) == tuple(tensor.shape) and shape.dtype == tensor.dtype
        for shape, tensor in zip(shapes, tensors, strict=True)
    )


def _row_shape(one: Tensor, two: Tensor) -> RowShape:
    grown = [dim for dim, (few, more) in enumerate(zip(one.shape, two.shape, strict=False)) if few != more]
    return RowShape(tuple(one.shape), grown[0] if len(grown) == 1 else None, one.dtype)


def _encode(structure: Structure) -> list[Any]:
    names = [str(shape.dtype).removeprefix("torch.") for shape in structure.shapes]
    return [structure.form, [[s.shape, s.dim, name] for s, name in zip(structure.shapes, names, strict=True)]]


def _decode(found: Any) -> Structure:
    form, shapes = found
    return Structure(form, tuple(RowShape(tuple(shape), dim, getattr(torch, name)) for shape, dim, name in shapes))
