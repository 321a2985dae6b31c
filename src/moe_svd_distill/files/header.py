"""The header of a safetensors file, read without torch and believed only after every check; and written.

The format: 8 bytes with the length of the header, little-endian; the header, a JSON object from tensor name to
``{"dtype", "shape", "data_offsets": [begin, end]}`` plus an optional ``__metadata__``; then the data without a gap.

The library's own writer wants every tensor at once and reports neither the digest nor a usable error number. A test
holds what is written with this byte for byte against the library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.dtypes import BYTES_PER_ELEMENT, RANKS
from moe_svd_distill.files.reading import FETCH_AGAIN, LFS_POINTER, json_object, opened, pointer_to, read_at

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**62
PREFIX_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: what the header says of a stored one, or what a quantised weight is when it is read.

    Attributes:
        name: The hub name.
        shape: Its shape.
        dtype: Its dtype in the words of safetensors.
        bytes: What it takes in the files; of a quantised weight, with its companions.
        file: Where it is; of a quantised weight, where its codes are.
        offset: Where in the file it begins, from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    file: Path
    offset: int

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory when it is read: more than ``bytes`` where it is quantised."""
        return math.prod(self.shape) * BYTES_PER_ELEMENT[self.dtype]


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
    """One weights file: its tensors in the order of their data, its size, and the digest of its header.

    Attributes:
        metadata: Name to text; in a GGUF file to what `Value` says.
        size: Bytes before the data.
    """

    file: Path
    file_bytes: int
    digest: str
    tensors: dict[str, TensorInfo]
    metadata: Mapping[str, Any]
    size: int

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The tensors as a writer lays them out."""
        return tuple(
            Slot(info.name, info.dtype, info.shape, info.offset - self.size, info.offset - self.size + info.bytes)
            for info in self.tensors.values()
        )


def read_header(path: Path) -> Header:
    """Read and check the header of one weights file."""
    with opened(path) as descriptor:
        file_bytes = os.fstat(descriptor).st_size
        return header_of(raw_header(descriptor, path, file_bytes), path, file_bytes)


def header_of(raw: bytes, path: Path, file_bytes: int) -> Header:
    """Check the header whose bytes, with the length in front, are already at hand."""
    tensors, metadata = _parsed(raw[PREFIX_BYTES:], path, file_bytes)
    return Header(path, file_bytes, hashlib.sha256(raw).hexdigest(), tensors, metadata, len(raw))


def raw_header(descriptor: int, path: Path, file_bytes: int) -> bytes:
    """The bytes of the header with its length in front, after checking that this length is possible."""

    def read(begin: int, end: int) -> tuple[bytes, int]:
        return read_at(descriptor, path, begin, min(end, file_bytes) - begin), file_bytes

    return fetched_header(read, path)[0]


def fetched_header(read: Callable[[int, int], tuple[bytes, int]], path: Path) -> tuple[bytes, int]:
    """The bytes of a header with its length in front, and the size of the file, which may lie elsewhere.

    Args:
        read: Gives the bytes from one offset to another, as far as the file has them, and its size.
        path: What the file is called in messages.
    """
    prefix, file_bytes = read(0, PREFIX_BYTES)
    end = PREFIX_BYTES + _header_length(prefix, path, file_bytes)
    return prefix + (read(PREFIX_BYTES, end)[0] if end > PREFIX_BYTES else b""), file_bytes


def _header_length(prefix: bytes, path: Path, file_bytes: int) -> int:
    """The length of the header, checked against the file's size and the format's limit."""
    if len(prefix) < PREFIX_BYTES:
        raise _bad(path, f"is not a safetensors file: found {len(prefix)} bytes, expected at least {PREFIX_BYTES}")
    if LFS_POINTER.startswith(prefix):
        raise pointer_to(path)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _bad(path, f"is not a safetensors file: header of {length} bytes (expected at most {MAX_HEADER_BYTES})")
    if PREFIX_BYTES + length > file_bytes:
        raise _bad(path, f"is cut off: found {file_bytes} bytes, but the header alone needs {PREFIX_BYTES + length}")
    return length


def _parsed(text: bytes, path: Path, file_bytes: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors that a header describes, each checked by itself and all together against the file's size."""
    if not text.startswith(b"{"):
        raise _bad(path, "is not a safetensors file: its header does not begin with '{'")
    entries = json_object(text, f"the header of {shown(path)}", unique_keys=True)
    metadata = _metadata(entries.pop("__metadata__", None), path)
    begin_of_data = PREFIX_BYTES + len(text)
    found = [_tensor(name, entry, path, begin_of_data) for name, entry in entries.items()]
    found.sort(key=lambda info: (info.offset, info.bytes))
    end = begin_of_data
    for info in found:
        if info.offset != end:
            kind = "overlaps the one before it" if info.offset < end else "leaves a gap before it"
            raise _bad(path, f"tensor {shown(info.name)} {kind}: found offset {info.offset}, expected {end}")
        end += info.bytes
    if end > file_bytes:
        raise _bad(path, f"is cut off: found {file_bytes} bytes, expected {end}")
    if end < file_bytes:
        raise _bad(path, f"is longer than its header says: found {file_bytes} bytes, expected {end}")
    return {info.name: info for info in found}, metadata


def lay_out(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[Slot, ...]:
    """Give every tensor (name, dtype code, shape) its place: wide types first, then by name."""
    slots = []
    position = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: (-RANKS[entry[1]], entry[0])):
        end = position + math.prod(shape) * BYTES_PER_ELEMENT[dtype]
        slots.append(Slot(name, dtype, shape, position, end))
        position = end
    return tuple(slots)


def encode_header(slots: Iterable[Slot], metadata: Mapping[str, str]) -> bytes:
    """The bytes of the file up to the first tensor. More than one metadata key is refused: readers may reorder them."""
    if len(metadata) > 1:
        raise ValueError("more than one metadata key makes the library rewrite the file differently each time")
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for slot in slots:
        table[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [slot.begin, slot.end]}
    return packed_header(table)


def packed_header(content: Mapping[str, object], *, copied: bool = False) -> bytes:
    """A header as JSON with its length in front, padded to eight bytes as the library does.

    Args:
        content: The JSON object.
        copied: Whether it comes from another file. JSON may hold half a surrogate pair, as an escape that the library
            refuses: a copy has it too, and nothing else is written with it.
    """
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    raw = text.encode("utf-8", "backslashreplace" if copied else "strict")
    raw += b" " * (-len(raw) % PREFIX_BYTES)
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw


def _tensor(name: str, entry: Any, path: Path, begin_of_data: int) -> TensorInfo:
    """One entry of the header, as far as it can be judged alone."""
    if not name or not name.isprintable() or "../" in name or "..\\" in name:
        # A tensor's name ends up in messages, in hashes and in other files' headers: it has to be harmless.
        raise _bad(path, f"holds a tensor with the name {shown(name)} (expected printable text without '../')")

    def bad(what: str) -> BadDataError:
        return _bad(path, f"tensor {shown(name)} {what}")

    if not isinstance(entry, dict):
        raise bad(f"is described by {shown(entry)} (expected an object)")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BYTES_PER_ELEMENT:
        raise bad(f"has dtype {shown(dtype)} (expected one of {', '.join(BYTES_PER_ELEMENT)})")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise bad(f"has shape {shown(shape)} (expected at most {MAX_DIMENSIONS} whole numbers)")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise bad(f"has data_offsets {shown(offsets)} (expected two whole numbers)")
    if math.prod(filter(None, shape)) > MAX_ELEMENTS:
        raise bad(f"has shape {shown(shape)}, more than any computer can hold")
    begin, end = offsets
    expected = math.prod(shape) * BYTES_PER_ELEMENT[dtype]
    if end - begin != expected:
        raise bad(f"has {end - begin} bytes (expected {expected} for {dtype} of shape {shown(shape)})")
    return TensorInfo(name, tuple(shape), dtype, expected, path, begin_of_data + begin)


def _metadata(metadata: Any, path: Path) -> dict[str, str]:
    """``__metadata__`` maps text to text."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "has a __metadata__ that is not a mapping from text to text")
    return metadata


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_ELEMENTS  # not `isinstance`: true is no count


def _bad(path: Path, what: str) -> BadDataError:
    return BadDataError(f"{shown(path)} {what}", FETCH_AGAIN)
