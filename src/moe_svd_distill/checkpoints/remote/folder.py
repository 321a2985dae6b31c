"""What is kept of a remote model on this machine: a folder like a model's own, with headers for weights files.

It holds the small files (configuration, index, tokenizer), the header of every weights file, the tensors fetched,
and a record of where the rest is. A `Checkpoint` of such a folder reads like any other, in every process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from moe_svd_distill.checkpoints.hub import CONNECTIONS, SMALL_FILES, raw_header_of
from moe_svd_distill.checkpoints.remote.source import HubSource, Source, open_source
from moe_svd_distill.checkpoints.remote.tensors import FetchedTensors
from moe_svd_distill.checkpoints.shards import find_layout
from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, shown
from moe_svd_distill.files.header import Header, TensorInfo, header_of
from moe_svd_distill.files.reading import json_object, read_at, read_small, relative_name
from moe_svd_distill.files.writing import durable_file, make_folder, write_json

MARKER = "remote.json"
_HEADERS, _TENSORS = "headers", "tensors"
_HUB, _STORE = "snapshots", "contents"
"""A folder of a commit of the hub has a parent of this name, as in the hub's own cache."""
_SMALL = 2
"""A tensor up to so many times what is asked of it is fetched whole."""
_BEGIN_AGAIN = "Remove this folder and start again"


@dataclass(frozen=True)
class RemoteFolder:
    """A folder made by `keep`.

    Attributes:
        folder: Where it is.
        address: Of the model.
        revision: What its files were.
        sizes: Weights file → bytes.
        names: All files of the model.
        room: Bytes that fetched tensors may take; None for as much as there is.
    """

    folder: Path
    address: str
    revision: str
    sizes: Mapping[str, int]
    names: tuple[str, ...]
    room: int | None

    @classmethod
    def of(cls, folder: Path) -> RemoteFolder | None:
        """The one at a folder; None where the folder is a model's own.

        Raises:
            BadDataError: Its record is damaged.
        """
        try:
            raw = read_small(folder / MARKER)
        except MissingInputError:
            return None
        record = json_object(raw, shown(folder / MARKER), unique_keys=True)
        try:
            sizes = {str(name): int(size) for name, size in record["sizes"].items()}
            room = None if record["room"] is None else int(record["room"])
            return cls(folder, str(record["address"]), str(record["revision"]), sizes, tuple(record["names"]), room)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadDataError(f"{shown(folder / MARKER)} is no record of a remote model", _BEGIN_AGAIN) from error

    def headers(self, files: Sequence[str]) -> dict[str, Header | DistillError]:
        """The header of each weights file, or what is wrong with it."""
        return {name: self._header(name) for name in files}

    def _header(self, name: str) -> Header | DistillError:
        try:
            return header_of(read_small(self.folder / _HEADERS / name), self.folder / name, self.sizes[name])
        except DistillError as fault:
            return fault
        except KeyError:
            return MissingInputError(f"the weights file {shown(name)} of {self.address} is missing", _BEGIN_AGAIN)

    def open(self, info: TensorInfo) -> tuple[int, Path]:
        """A descriptor of a file that holds a tensor and nothing else, fetched where it is not there, and its path."""
        return self._tensors.open(self._file_of(info), info)

    def fetch(self, tensors: Iterable[TensorInfo]) -> None:
        """Fetch several tensors side by side."""
        self._tensors.fetch((self._file_of(info), info) for info in tensors)

    def beginning(self, info: TensorInfo, count: int) -> bytes:
        """The first bytes of a tensor."""
        return next(iter(self.extracts([(info, 0, count)])))

    def extracts(self, wanted: Sequence[tuple[TensorInfo, int, int]]) -> list[bytes]:
        """Bytes of tensors, each given with the first and how many; small tensors are fetched and kept."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(lambda each: self._extract(*each), wanted))

    def _extract(self, info: TensorInfo, begin: int, count: int) -> bytes:
        file = self._file_of(info)
        if not count:
            return b""
        if info.bytes > _SMALL * count and not self._tensors.has(file, info):
            return self._source.read(file, info.offset + begin, info.offset + begin + count)[0]
        descriptor, path = self.open(info)
        try:
            return read_at(descriptor, path, begin, count)
        finally:
            os.close(descriptor)

    @cached_property
    def _tensors(self) -> FetchedTensors:
        def read(name: str, begin: int, end: int) -> tuple[bytes, int]:
            return self._source.read(name, begin, end)

        return FetchedTensors(self.folder / _TENSORS, read, self.room)

    @cached_property
    def _source(self) -> Source:
        """Asked when the first tensor is fetched."""
        return open_source(self.address, self.revision)

    def _file_of(self, info: TensorInfo) -> str:
        return info.file.relative_to(self.folder).as_posix()


def keep(address: str, room: int | None) -> tuple[Path, str]:
    """The folder of a remote model, made where it is not there: small files and headers are fetched, no tensor is.

    Args:
        address: Of the model.
        room: Bytes that its tensors may take; None leaves what was said before.

    Returns:
        The folder, and a note where the hub was not asked; empty where it was.

    Raises:
        MissingInputError: There is no such model, or files are missing.
        RemoteError: It cannot be reached, refuses, or sends no parts of files.
        BadDataError: Its index names files outside, or the like.
        CannotWriteError: There is no room.
    """
    source = open_source(address)
    folder = _place(source)
    known, note = RemoteFolder.of(folder), ""
    if known is None:
        if isinstance(source, HubSource) and source.snapshot.unreachable is not None:
            raise source.snapshot.unreachable
        known = _made(folder, source, room)
    elif isinstance(source, HubSource):
        note = source.snapshot.cache_note
    if room not in (None, known.room):
        _write_record(replace(known, room=room))
    return folder, note


def _place(source: Source) -> Path:
    from huggingface_hub.constants import HF_HOME

    name = re.sub(r"[^A-Za-z0-9._-]+", "--", source.address.partition("@")[0].replace("://", "--"))
    kind = _HUB if isinstance(source, HubSource) else _STORE
    return Path(HF_HOME).absolute() / "moe-svd-distill" / name / kind / source.revision


def _made(folder: Path, source: Source, room: int | None) -> RemoteFolder:
    for name in source.names:
        if SMALL_FILES.fullmatch(name):
            _write(folder / relative_name(name, source.address), source.small_file(name))
    files = find_layout(folder, source.names).files
    for name in files:
        if name not in source.names:
            raise MissingInputError(
                f"the weights file {shown(name)} of {source.address} is missing", "Give another model"
            )

    def header(name: str) -> int:
        raw, size = raw_header_of(partial(source.read, name), folder / name)
        _write(folder / _HEADERS / name, raw)
        return size

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        sizes = dict(zip(files, pool.map(header, files), strict=True))
    made = RemoteFolder(folder, source.address, source.revision, sizes, source.names, room)
    _write_record(made)
    return made


def _write(path: Path, raw: bytes) -> None:
    make_folder(path.parent)
    with durable_file(path) as sink:
        sink.write(raw)


def _write_record(made: RemoteFolder) -> None:
    record: dict[str, Any] = {
        "address": made.address,
        "revision": made.revision,
        "sizes": dict(made.sizes),
        "names": list(made.names),
        "room": made.room,
    }
    write_json(made.folder / MARKER, record)
