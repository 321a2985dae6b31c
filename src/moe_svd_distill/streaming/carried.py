"""What is carried from layer to layer, as data: where it lies, its form, and its bytes sequence by sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming.gates import Call
from moe_svd_distill.streaming.trees import Path, at, flatten, put, unflatten

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

    def fits(self, form: Any, tensors: Sequence[Tensor], rows: int) -> bool:
        """Whether a flattened tree is one of these for a number of sequences."""
        return bool(form == self.form) and all(
            shape.of(rows) == tuple(tensor.shape) and shape.dtype == tensor.dtype
            for shape, tensor in zip(self.shapes, tensors, strict=True)
        )

    def encode(self) -> list[Any]:
        """For JSON."""
        return [self.form, [[s.shape, s.dim, str(s.dtype).removeprefix("torch.")] for s in self.shapes]]

    @staticmethod
    def decode(found: Any) -> Structure:
        """What `encode` has made."""
        form, shapes = found
        return Structure(form, tuple(RowShape(tuple(shape), dim, getattr(torch, name)) for shape, dim, name in shapes))


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
        form, tensors = flatten(self.values(call))
        if not self.structure.fits(form, tensors, rows):
            raise IncompatiblePairError(
                "What a layer is given changes from batch to batch", "Report the architecture to the project"
            )
        return [shape.split(tensor) for tensor, shape in zip(tensors, self.structure.shapes, strict=True)]

    def values(self, call: Call) -> tuple[Any, ...]:
        """What lies in its places."""
        return tuple(at(call, path) for path in self.paths)

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

    def encode(self) -> dict[str, Any]:
        """For JSON."""
        return {"paths": [list(path) for path in self.paths], "values": self.structure.encode()}

    @staticmethod
    def decode(found: Any) -> Gate:
        """What `encode` has made."""
        return Gate(tuple(tuple(path) for path in found["paths"]), Structure.decode(found["values"]))


NOTHING = Gate((), Structure(["tuple", []], ()))
