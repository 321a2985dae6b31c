"""The header of a GGUF file: its metadata, asked for by name, and where each tensor lies; believed after every check.

The format: ``GGUF``, the version, how many tensors and how many pieces of metadata; the metadata, a name and a typed
value each; a table of tensors; then the data, every tensor at an aligned place. Numbers are little-endian.

Types and block sizes are the package `gguf`'s. Its reader is not used: it makes an array object of every token, which
took 7 s and 490 MB for 150,000 of them in every process that opens the file, and it does not end on a damaged count.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, shown
from moe_svd_distill.files.header import MAX_ELEMENTS, Header, TensorInfo
from moe_svd_distill.files.reading import FETCH_AGAIN, LFS_POINTER, locate, opened, pointer_to, read_at

Value: TypeAlias = bool | int | float | str | tuple[bool | int | float, ...] | None
"""What a piece of metadata says; long arrays and arrays of text, which only tokenizers have, are left out as None."""

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 29
MAX_DIMENSIONS = 4
LONGEST_ARRAY = 4096
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY, _FLOAT = 8, 9, 6
_PIECE = 1 << 20

ANOTHER = "Give the model's safetensors"
_NO_SETTING = ("vocab_size", "attention.value_length", "rope.scaling.finetuned")


@dataclass(frozen=True)
class Settings:
    """What a file says of its model, below the name of its architecture.

    Attributes:
        source: What the file is called in messages.
        architecture: llama.cpp's name.
        metadata: Name to value.
        tensors: llama.cpp's name to where it lies.
        one_table: Whether embeddings and head are the same but for rounding.
        used: Gathers what was asked for.
    """

    source: str
    architecture: str
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    one_table: bool = False
    used: set[str] = field(default_factory=set)

    def find(self, key: str) -> Any:
        """A setting that is one value, or None."""
        name = f"{self.architecture}.{key}"
        self.used.add(name)
        value = self.metadata.get(name)
        if isinstance(value, tuple) and len(set(value)) == 1:
            return value[0]  # the same for every layer
        if isinstance(value, tuple):
            raise BadDataError(f"{self.source} has another {name} for each layer, which is not read here", ANOTHER)
        return value

    def need(self, key: str) -> Any:
        """A setting that has to be there."""
        value = self.find(key)
        if value is None:
            raise BadDataError(f"{self.source} does not say {self.architecture}.{key}", ANOTHER)
        return value

    @property
    def layers(self) -> int:
        """Decoder layers, without those that predict further tokens."""
        return int(self.need("block_count") - (self.find("nextn_predict_layers") or 0))

    @property
    def head_dim(self) -> int:
        """Dimensions of a head of queries and keys."""
        found = self.find("attention.key_length")
        return int(found or self.need("embedding_length") // self.need("attention.head_count"))

    def unused(self) -> Sequence[str]:
        """Settings of the architecture that nothing was made of."""
        known = {f"{self.architecture}.{key}" for key in _NO_SETTING}
        return [
            key for key in self.metadata if key.startswith(f"{self.architecture}.") and key not in self.used | known
        ]


def package_fault(why: str) -> MissingInputError | None:
    """What is wrong where the package `gguf` is not installed; None where it is."""
    if find_spec("gguf") is not None:
        return None
    return MissingInputError(f"{why}, and the package gguf is not installed", "Install moe-svd-distill[gguf]")


def headers_of(first: Path) -> Iterator[Header | DistillError]:
    """The header of the file, or of all files of a model that was split, by the first of them.

    Tensors have llama.cpp's names, and their dtype is the name of a type of ggml, such as Q4_K. What is wrong with a
    file comes in the place of its header.
    """
    try:
        opening = _read(first)
        names = _names_of_split(first, opening.metadata)
    except DistillError as fault:
        yield fault
        return
    yield opening
    for number, path in enumerate(names, 1):
        try:
            header = _read(locate(path.parent, path.name))
            found = header.metadata.get("split.no")
            if found != number:
                raise _bad(path, f"says it is number {shown(found)} of the split files (expected {number})")
            yield header
        except DistillError as fault:
            yield fault


def _read(path: Path) -> Header:
    with opened(path) as descriptor:
        return _Reading(descriptor, path).header()


def _names_of_split(first: Path, metadata: Mapping[str, Value]) -> list[Path]:
    """The other files of a model that was split."""
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if type(count) is not int or not 0 <= count < 100_000:
        raise _bad(first, f"says it is one of {shown(count)} files")
    if count <= 1:
        return []
    match = SPLIT.fullmatch(first.name)
    if match is None or int(match["count"]) != count:
        raise BadDataError(
            f"{shown(first)} is one of {count} files, expected a name like model-00001-of-{count:05d}.gguf",
            "Give the files their names back",
        )
    names = [first.with_name(f"{match['stem']}-{place:05d}-of-{count:05d}.gguf") for place in range(1, count + 1)]
    if number != 0:
        raise MissingInputError(f"{shown(first)} is not the first of its {count} files", f"Give {shown(names[0])}")
    if absent := [path for path in names if not path.exists()]:
        what = f"{shown(first)} lacks {len(absent)} of {count} files; the first missing one is {shown(absent[0].name)}"
        raise MissingInputError(what, FETCH_AGAIN)
    return names[1:]


class _Reading:
    """The bytes of a header, read as they are asked for."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path, self._bytes = descriptor, path, b""
        self._size, self._place = os.fstat(descriptor).st_size, 0

    def header(self) -> Header:
        magic = self._take(4) if self._size >= 24 else b""
        if magic and LFS_POINTER.startswith(magic):
            raise pointer_to(self._path)
        if magic != MAGIC:
            raise self._bad("is not a GGUF file: it does not begin with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            what = "is big-endian" if version & 0xFFFF == 0 else f"is of version {version}"
            raise self._bad(f"{what} (expected little-endian, version {' or '.join(map(str, VERSIONS))})")
        tensors, pieces = self._number("Q"), self._number("Q")
        metadata: dict[str, Value] = {}
        for _ in range(pieces):
            name = self._text()
            if name in metadata:
                raise self._bad(f"has {shown(name)} twice")
            metadata[name] = self._value(self._number("I"))
        table = [self._entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._bad(f"has the alignment {shown(alignment)} (expected a power of two)")
        self._take(-self._place % alignment if table else 0)
        begin, infos = self._place, {}
        for name, shape, kind, offset in table:
            if name in infos:
                raise self._bad(f"has tensor {shown(name)} twice")
            infos[name] = self._tensor(name, shape, kind, (begin, offset, alignment))
        self._refuse_overlaps(infos)
        digest = hashlib.sha256(self._bytes[:begin]).hexdigest()
        return Header(self._path, self._size, digest, infos, metadata, begin)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, place: tuple[int, int, int]) -> TensorInfo:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        begin, offset, alignment = place
        try:
            named = GGMLQuantizationType(kind)
        except ValueError:
            raise BadDataError(
                f"{shown(self._path)}: tensor {shown(name)} is of type {kind}, which the installed gguf does not know",
                "Install a newer gguf, or fetch the model again",
            ) from None
        elements, taken = GGML_QUANT_SIZES[named]
        if shape[-1] % elements:
            raise self._bad(f"tensor {shown(name)} has rows of {shape[-1]} (expected whole blocks of {elements})")
        size = math.prod(shape) // elements * taken
        if offset % alignment:
            raise self._bad(f"tensor {shown(name)} begins at {offset}, no multiple of {alignment}")
        if begin + offset + size > self._size:
            raise self._bad(f"is cut off: found {self._size} bytes, tensor {shown(name)} needs {begin + offset + size}")
        return TensorInfo(name, shape, named.name, size, self._path, begin + offset)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("I")
        if not name or not name.isprintable() or "../" in name or "..\\" in name:
            raise self._bad(f"holds a tensor with the name {shown(name)} (expected printable text without '../')")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._bad(f"tensor {shown(name)} has {dimensions} dimensions (expected 1 to {MAX_DIMENSIONS})")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]  # ggml counts from the innermost one
        if math.prod(filter(None, shape)) > MAX_ELEMENTS or not all(shape):
            raise self._bad(f"tensor {shown(name)} has shape {shown(shape)}, which no tensor can have")
        return name, shape, self._number("I"), self._number("Q")

    def _refuse_overlaps(self, infos: Mapping[str, TensorInfo]) -> None:
        end = 0
        for info in sorted(infos.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise self._bad(f"tensor {shown(info.name)} overlaps the one before it")
            end = info.offset + info.bytes

    def _value(self, kind: int) -> Value:
        if kind in _SCALARS:
            value: Value = self._number(_SCALARS[kind])
            return _shortest(value) if kind == _FLOAT and isinstance(value, float) else value
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            raise self._bad(f"has metadata of type {kind}, which the format does not have")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            raw = self._take(count * struct.calcsize(f"<{code}"))
            return tuple(struct.unpack(f"<{count}{code}", raw)) if count <= LONGEST_ARRAY else None
        if inner != _TEXT:
            raise self._bad(f"has an array of type {inner} among its metadata (expected numbers or text)")
        for _ in range(count):
            self._take(self._number("Q"))
        return None

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "surrogateescape")

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        """The next bytes; what is asked for beyond the file is an error, however much it is."""
        end = self._place + count
        if end > len(self._bytes):
            if end > min(self._size, MAX_HEADER_BYTES):
                raise self._bad(f"is cut off or damaged: found {self._size} bytes, its header alone asks for {end}")
            wanted = min(self._size, max(end, 2 * len(self._bytes), _PIECE))
            self._bytes += read_at(self._descriptor, self._path, len(self._bytes), wanted - len(self._bytes))
        found = self._bytes[self._place : end]
        self._place = end
        return found

    def _bad(self, what: str) -> BadDataError:
        return _bad(self._path, what)


def _shortest(value: float) -> float:
    """The decimal that was meant: 1e-6 for the single-precision number nearest to it."""
    import numpy as np

    return float(str(np.float32(value)))


def _bad(path: Path, what: str) -> BadDataError:
    return BadDataError(f"{shown(path)} {what}", FETCH_AGAIN)
