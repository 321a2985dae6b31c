"""What is carried from layer to layer, as data: where it lies, its form, and its bytes sequence by sequence.

What layers are given and return are trees: nested containers of tensors and plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming.gates import Call

_ALIGNMENT = 16
Path: TypeAlias = tuple[str | int, ...]
_PLAIN = (bool, int, float, str, type(None))
_CONSTANT = (*_PLAIN, torch.dtype, torch.device)


def flatten(tree: Any) -> tuple[Any, list[Tensor]]:
    """The tensors of a tree in order, and all else about it, which JSON can hold.

    Raises:
        IncompatiblePairError: Something in it is neither a container, nor a tensor, nor a plain value.
    """
    if isinstance(tree, Tensor):
        return ["tensor"], [tree]
    if isinstance(tree, _PLAIN):
        return ["value", tree], []
    tensors: list[Tensor] = []

    def of(value: Any) -> Any:
        form, found = flatten(value)
        tensors.extend(found)
        return form

    if isinstance(tree, Mapping) and all(isinstance(key, (str, int)) for key in tree):
        return ["dict", [[key, of(value)] for key, value in tree.items()]], tensors
    if type(tree) in (tuple, list):
        return [type(tree).__name__, [of(value) for value in tree]], tensors
    raise _unknown(tree)


def unflatten(form: Any, tensors: Iterator[Tensor]) -> Any:
    """The tree that `flatten` took apart, with other tensors perhaps."""
    kind, *content = form
    if kind == "tensor":
        return next(tensors)
    if kind == "value":
        return content[0]
    if kind == "dict":
        return {key: unflatten(value, tensors) for key, value in content[0]}
    values = [unflatten(value, tensors) for value in content[0]]
    return tuple(values) if kind == "tuple" else values


def changed(tree: Any, others: tuple[Any, ...], path: Path = ()) -> Iterator[Path]:
    """The places where a tree differs from any of the others: the shallowest at which one value can take another's.

    Raises:
        IncompatiblePairError: It holds something that cannot be compared.
    """
    if isinstance(tree, Tensor):
        if not all(isinstance(o, Tensor) and o.dtype == tree.dtype and torch.equal(o, tree) for o in others):
            yield path
    elif isinstance(tree, _CONSTANT):
        if not all(type(o) is type(tree) and o == tree for o in others):
            yield path
    elif isinstance(tree, Mapping):
        if all(isinstance(o, Mapping) and list(o) == list(tree) for o in others):
            for key, value in tree.items():
                yield from changed(value, tuple(o[key] for o in others), (*path, key))
        else:
            yield path
    elif type(tree) in (tuple, list):
        if all(type(o) is type(tree) and len(o) == len(tree) for o in others):
            for key, value in enumerate(tree):
                yield from changed(value, tuple(o[key] for o in others), (*path, key))
        else:
            yield path
    else:
        raise _unknown(tree)


def at(tree: Any, path: Path) -> Any:
    """What lies at a place."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Path, value: Any) -> Any:
    """The tree with a value at a place. Dicts and lists, which others may hold too, are changed where they are."""
    if path:
        new = put(tree[path[0]], path[1:], value)
        if isinstance(tree, tuple):
            return tuple(new if place == path[0] else old for place, old in enumerate(tree))
        tree[path[0]] = new
        return tree
    if isinstance(tree, MutableMapping) and isinstance(value, Mapping):
        tree.clear()
        tree.update(value)
        return tree
    if isinstance(tree, list) and isinstance(value, list):
        tree[:] = value
        return tree
    return value


def _unknown(value: Any) -> IncompatiblePairError:
    return IncompatiblePairError(
        f"A decoder layer is given or returns a {type(value).__name__}, expected tensors and plain values",
        "Report the architecture to the project",
    )


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

    def encode(self) -> dict[str, object]:
        """For JSON."""
        return {"paths": [list(path) for path in self.paths], "values": self.structure.encode()}

    @staticmethod
    def decode(found: Any) -> Gate:
        """What `encode` has made."""
        return Gate(tuple(tuple(path) for path in found["paths"]), Structure.decode(found["values"]))


NOTHING = Gate((), Structure(["tuple", []], ()))
