"""Values of all sequences: in one safetensors file that can be written while they are computed, and in memory.

Final states are a tensor (n, length, d), what is recorded between two layers one of bytes (n, bytes of a sequence).

The last tensor of the file, ``sha256``, is the digest of every byte before it, header included: the only place for a
digest that is not known before the last state is. A file counts only if that digest agrees.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.errors import BadDataError, DistillError
from moe_svd_distill.files.dtypes import FLOATS, dtype_code, tensor_bytes, torch_dtype
from moe_svd_distill.files.header import Header, encode_header, lay_out, read_header
from moe_svd_distill.files.reading import opened, read_at, read_pieces
from moe_svd_distill.files.writing import durable_file
from moe_svd_distill.streaming.carried import Gate
from moe_svd_distill.streaming.devices import activation_budget

_METADATA = "moe_svd_distill"
_STATES, _BYTES, _DIGEST = "states", "recorded", "sha256"  # of tensors of one width the digest has to be the last
_DIGEST_BYTES = 32
_RUN_AGAIN = "Run the same command again"


def write_states(path: Path, body: Mapping[str, Any], sequences: int, batches: Iterable[Tensor]) -> None:
    """Write states batch by batch; the file is whole or absent.

    Args:
        path: Where to.
        body: What the file says about itself.
        sequences: How many sequences the batches have together.
        batches: States (rows, length, d) or bytes (rows, bytes) on the CPU, in the order of the sequences; at least
            one batch.

    Raises:
        CannotWriteError: The disk is full, or the folder does not let itself be written to.
    """
    iterator = iter(batches)
    first = next(iterator)
    slots = lay_out(
        [
            (_BYTES if first.dtype == torch.uint8 else _STATES, dtype_code(first.dtype), (sequences, *first.shape[1:])),
            (_DIGEST, "U8", (_DIGEST_BYTES,)),
        ]
    )
    text = json.dumps(dict(body), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    written = 0
    with durable_file(path) as sink:
        sink.write(encode_header(slots, {_METADATA: text}))
        for batch in chain([first], iterator):
            sink.write(tensor_bytes(batch))
            written += batch.shape[0]
        if written != sequences:
            raise ValueError(f"{written} sequences were written to {path}, expected {sequences}")
        sink.write(bytes.fromhex(sink.sha256))


def find_fault(path: Path, body: Mapping[str, Any]) -> str | None:
    """What is wrong with a file of states, or None when every byte of it is as it was written.

    Args:
        path: The file.
        body: What it must say about itself, key by key.
    """
    try:
        header = read_header(path)
        found = _body(header)
        if different := next((key for key in body if found.get(key) != body[key]), None):
            return f"its {different} is {found.get(different)!r}, expected {body[different]!r}"
        digest = hashlib.sha256()
        end = header.file_bytes - _DIGEST_BYTES
        with opened(path) as descriptor:
            for piece in read_pieces(descriptor, path, 0, end):
                digest.update(piece)
            if read_at(descriptor, path, end, _DIGEST_BYTES) != digest.digest():
                return "its bytes differ from their digest"
    except DistillError as error:
        return error.what
    return None


class StatesFile:
    """A checked file of states, mapped into memory; pages come and go as the system likes.

    Attributes:
        path: The file.
        shape: Sequences, length, width; or sequences and bytes of each.
        dtype: Type of the values.
        body: What the file says about itself.
    """

    def __init__(self, path: Path) -> None:
        try:
            header = read_header(path)
            self.body = _body(header)
            info = next(info for name, info in header.tensors.items() if name != _DIGEST)
            with path.open("rb") as file:
                # A private mapping: a change made in place stays in this process.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (DistillError, OSError) as error:
            reason = error.what if isinstance(error, DistillError) else error
            raise BadDataError(f"{path} cannot be used: {reason}", _RUN_AGAIN) from error
        self.path = path
        self.shape = info.shape
        self.dtype = torch_dtype(info.dtype)
        flat = torch.frombuffer(self._map, dtype=self.dtype, count=math.prod(info.shape), offset=info.offset)
        self._states = flat.view(info.shape)

    def rows(self, rows: slice) -> Tensor:
        """The values of some sequences, (rows, …), as a view on the file."""
        return self._states[rows]


class LayerInputs:
    """What was recorded at a layer for all sequences of a pass: the layers from there on can be run again.

    Attributes:
        layer: Its number, from 1: at the first one everything follows from the token ids.
        path: The file.
        layout: What it takes to go on from there, for `GateLayout.decode`.
    """

    def __init__(self, layer: int, path: Path) -> None:
        self.layer, self.path, self._file = layer, path, StatesFile(path)
        self.layout = self._file.body["layout"]
        self._gate = Gate.decode(self.layout)

    def rows(self, rows: slice) -> list[Tensor]:
        """Of some sequences, (rows, …), as private views on the file."""
        return self._gate.unpack(self._file.rows(rows))


class GateValues:
    """What was recorded at a gate for all sequences, in memory or mapped from a file.

    Attributes:
        in_memory: Whether it is.
    """

    def __init__(self, gate: Gate, packed: Tensor | None, path: Path | None) -> None:
        """Take what is there.

        Args:
            gate: What passes it.
            packed: In memory, (n, bytes of a sequence); None where it is mapped from the file.
            path: The file that holds it too, if there is one.
        """
        self._gate, self._path = gate, path
        self.in_memory = packed is not None
        self._packed = self._mapped() if packed is None else packed

    def rows(self, rows: slice) -> list[Tensor]:
        """Of some sequences, (rows, …), as views."""
        return self._gate.unpack(self._packed[rows])

    def room_for(self, width: int, budget: int) -> Tensor | None:
        """Where to put so many bytes for each sequence while this is read, (n, width); None beyond a budget of bytes.

        What a layer gives takes the place of what it was given as it comes, because a sequence depends on no other one.
        Where the one is wider than the other, this is read from its file from now on, if there is one.
        """
        fits = len(self._packed) * width <= budget
        if fits and self.in_memory and self._packed.shape[1] == width:
            return self._packed
        if self.in_memory and self._path is not None:
            self._packed, self.in_memory = self._mapped(), False
        return torch.empty(len(self._packed), width, dtype=torch.uint8) if fits else None

    def _mapped(self) -> Tensor:
        assert self._path is not None
        return StatesFile(self._path).rows(slice(None))


class KeptInputs:
    """What each layer was given, batch by batch: on the device, in memory, or in files that go when this closes."""

    def __init__(self, folder: Path, device: torch.device, budget: int | None) -> None:
        """Nothing is kept yet.

        Args:
            folder: Where files lie.
            device: Where the layers are.
            budget: Bytes there, and as many in memory beside a GPU; None for a quarter of what is free in each.
        """
        self._folder = folder
        self._left = {name: left if budget is None else budget for name, left in _free(device).items()}
        self._kept: dict[tuple[int, int], list[Tensor]] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def put(self, layer: int, number: int, recorded: Sequence[Tensor]) -> None:
        """Keep what a layer is given."""
        self._kept[layer, number] = [
            self._placed(f"{layer}-{number}-{place}", tensor.detach()) for place, tensor in enumerate(recorded)
        ]

    def take(self, layer: int, number: int) -> list[Tensor]:
        """Hand it out for good."""
        return self._kept.pop((layer, number))

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        for device, left in self._left.items():
            if tensor.nbytes <= left:
                self._left[device] -= tensor.nbytes
                return tensor.to(device)
        if self._scratch is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._scratch = tempfile.TemporaryDirectory(prefix="inputs-", dir=self._folder)
        path = Path(self._scratch.name) / name
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        mapped.copy_(tensor.reshape(-1))
        return mapped.view(tensor.shape)

    def __enter__(self) -> KeptInputs:
        return self

    def __exit__(self, *error: object) -> None:
        self._kept.clear()
        if self._scratch is not None:
            self._scratch.cleanup()


def slices(count: int, step: int) -> Iterator[slice]:
    """Cut a number of sequences into batches."""
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def _body(header: Header) -> Mapping[str, Any]:
    tensors = dict(header.tensors)
    try:
        body = json.loads(header.metadata[_METADATA])
        digest = tensors.pop(_DIGEST)
        (name, values), *more = tensors.items()
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadDataError("it is no file of hidden states", _RUN_AGAIN) from error
    in_order = values.offset <= digest.offset and digest.shape == (_DIGEST_BYTES,)
    of_types = values.dtype in (*FLOATS, "U8") and digest.dtype == "U8"
    if not isinstance(body, dict) or more or not in_order or not of_types:
        raise BadDataError("it is no file of hidden states", _RUN_AGAIN)
    if (name, len(values.shape)) != ((_BYTES, 2) if values.dtype == "U8" else (_STATES, 3)):
        raise BadDataError("it is no file of hidden states", _RUN_AGAIN)
    return body


def _free(device: torch.device) -> dict[torch.device, int]:
    """Bytes that the inputs of layers may take, on a GPU first and then in the machine's memory."""
    machine = {torch.device("cpu"): activation_budget()}
    return machine if device.type == "cpu" else {device: activation_budget(device)} | machine
