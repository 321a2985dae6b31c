"""The layout of a safetensors file: enough to write one piece by piece and to copy tensors without loading them.

The library's own writer wants every tensor at once and reports neither the digest nor a usable error number. The
layout is an eight-byte length, a JSON header and the bytes; a test holds what is written here byte for byte against
the library. Reading tensors as tensors stays with the library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 4 << 20
_LARGEST_HEADER = 100_000_000  # the library's own limit
# In the library's order: wider and later types come first in a file, so that every tensor is aligned.
_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
_RANKS = {code: rank for rank, code in enumerate(_WIDTHS)}
_CODES = {
    "torch.bool": "BOOL", "torch.uint8": "U8", "torch.int8": "I8", "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.int16": "I16", "torch.uint16": "U16", "torch.float16": "F16",
    "torch.bfloat16": "BF16", "torch.int32": "I32", "torch.uint32": "U32", "torch.float32": "F32",
    "torch.float64": "F64", "torch.int64": "I64", "torch.uint64": "U64",
}  # fmt: skip


class DamagedFileError(ValueError):
    """The file is not a whole safetensors file; the message says what is wrong with it."""


@dataclass(frozen=True)
class Slot:
    """One tensor's place: its type and shape, and where its bytes lie, counted from the first byte after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What stands before the bytes of the tensors."""

    slots: tuple[Slot, ...]
    metadata: Mapping[str, str]
    size: int

    @property
    def payload_bytes(self) -> int:
        """How many bytes follow the header."""
        return max((slot.end for slot in self.slots), default=0)


def dtype_code(dtype: object) -> str:
    """The file's name of a torch dtype.

    Raises:
        TypeError: The format cannot hold it.
    """
    try:
        return _CODES[str(dtype)]
    except KeyError:
        raise TypeError(f"a part cannot hold tensors of {dtype}") from None


def lay_out(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[Slot, ...]:
    """Give every tensor (name, dtype code, shape) its place: wide types first, then by name."""
    slots = []
    position = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: (-_RANKS[entry[1]], entry[0])):
        end = position + math.prod(shape) * _WIDTHS[dtype]
        slots.append(Slot(name, dtype, shape, position, end))
        position = end
    return tuple(slots)


def encode_header(slots: Iterable[Slot], metadata: Mapping[str, str]) -> bytes:
    """The bytes of the file up to the first tensor. More than one metadata key is refused: readers may reorder them."""
    if len(metadata) > 1:
        raise ValueError("more than one metadata key makes the library rewrite the file differently each time")
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for slot in slots:
        table[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [slot.begin, slot.end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> Header:
    """Read and check the header of ``path``: every byte of the file must belong to exactly one tensor.

    Raises:
        DamagedFileError: The file is truncated, too long, or not a safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise DamagedFileError(f"its header is {length} bytes long in a file of {size} bytes")
        text = file.read(length)
    try:
        table = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = dict(table.pop("__metadata__", {}))
        slots = tuple(_slot(name, entry) for name, entry in table.items())
        position = 0
        for slot in sorted(slots, key=lambda slot: (slot.begin, slot.end)):
            if slot.begin != position or slot.end - slot.begin != math.prod(slot.shape) * _WIDTHS[slot.dtype]:
                raise DamagedFileError("its header gives a tensor a wrong place")
            position = slot.end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, DamagedFileError) else "its header cannot be read"
        raise DamagedFileError(reason) from error
    if 8 + length + position != size:
        raise DamagedFileError(f"found {size} bytes, expected {8 + length + position}")
    return Header(slots, metadata, 8 + length)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise DamagedFileError("its header names something twice")
    return table


def _slot(name: str, entry: dict[str, Any]) -> Slot:
    slot = Slot(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
    if any(type(number) is not int or number < 0 for number in (*slot.shape, slot.begin, slot.end)):
        raise DamagedFileError("its header gives a tensor a place that is no number of bytes")
    return slot


def read_bytes(path: Path, begin: int, end: int) -> Iterator[memoryview]:
    """The bytes from ``begin`` to ``end`` of a file, in pieces that share one buffer.

    Plain reads and no memory map: a file that shrinks meanwhile is an error here and would be a SIGBUS there.

    Raises:
        DamagedFileError: The file ends before ``end``.
    """
    buffer = memoryview(bytearray(min(CHUNK, max(end - begin, 1))))
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while begin < end:
            count = file.readinto(buffer[: min(len(buffer), end - begin)])
            if not count:
                raise DamagedFileError(f"it ends {end - begin} bytes early")
            begin += count
            yield buffer[:count]
