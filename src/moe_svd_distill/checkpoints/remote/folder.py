"""What is kept of a remote model on this machine: a folder like a model's own, with headers for weights files.

It holds the small files (configuration, index, tokenizer), the header of every weights file, the tensors fetched,
and a record of where the rest is. A `Checkpoint` of such a folder reads like any other, in every process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.checkpoints.hub import CONNECTIONS, SMALL_FILES, Snapshot
from moe_svd_distill.checkpoints.identity import Extract, digest_of
from moe_svd_distill.checkpoints.remote.source import Source, open_source
from moe_svd_distill.checkpoints.remote.tensors import FetchedTensors
from moe_svd_distill.checkpoints.shards import find_layout
from moe_svd_distill.checkpoints.storage import Storage
from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, shown
from moe_svd_distill.files.header import Header, TensorInfo, fetched_header, header_of
from moe_svd_distill.files.reading import json_object, read_at, read_small, relative_name
from moe_svd_distill.files.writing import durable_file, make_folder, write_json

if TYPE_CHECKING:
    import torch

MARKER = "remote.json"
_HEADERS, _TENSORS = "headers", "tensors"
_HUB, _STORE = "snapshots", "contents"
"""A folder of a commit of the hub has a parent of this name, as in the hub's own cache."""
_SMALL = 2
"""A tensor up to so many times what is asked of it is fetched whole."""
_BEGIN_AGAIN = "Remove this folder and start again"


class RemoteFolder(Storage):
    """A folder made by `keep`.

    Attributes:
        address: Of the model.
        revision: What its files were.
        sizes: Weights file → bytes.
        names: All files of the model.
        room: Bytes that fetched tensors may take; None for as much as there is.
    """

    is_remote = True

    def __init__(
        self,
        folder: Path,
        *,
        address: str,
        revision: str,
        sizes: Mapping[str, int],
        names: Sequence[str],
        room: int | None,
    ) -> None:
        """Nothing is asked of the source before the first tensor is fetched."""
        super().__init__(folder)
        self.address, self.revision = address, revision
        self.sizes, self.names, self.room = sizes, tuple(names), room

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
        record: dict[str, Any] = json_object(raw, shown(folder / MARKER), unique_keys=True)
        try:
            return cls(
                folder,
                address=str(record["address"]),
                revision=str(record["revision"]),
                sizes={str(name): int(size) for name, size in record["sizes"].items()},
                names=record["names"],
                room=None if record["room"] is None else int(record["room"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadDataError(f"{shown(folder / MARKER)} is no record of a remote model", _BEGIN_AGAIN) from error

    def write_record(self) -> None:
        """Keep what `of` reads."""
        record = {
            "address": self.address,
            "revision": self.revision,
            "sizes": dict(self.sizes),
            "names": list(self.names),
            "room": self.room,
        }
        write_json(self.directory / MARKER, record)

    def file_names(self) -> Sequence[str]:
        """As `Storage`."""
        return self.names

    def beginning(self, info: TensorInfo, count: int) -> bytes:
        """As `Storage`."""
        return self._extract(info, 0, count)

    def cache_key(self, headers: Mapping[str, Header]) -> str:
        """As `Storage`: of the address, the revision, and the headers."""
        named = (self.address, self.revision, *(header.digest for header in headers.values()))
        return digest_of("pieces 1", [*(name.encode() for name in named), *self._configuration()])

    def is_readable(self, tensors: Iterable[TensorInfo]) -> bool:
        """As `Storage`."""
        return True

    def prefetch(self, tensors: Iterable[TensorInfo]) -> None:
        """As `Storage`."""
        self._tensors.fetch((self._file_of(info), info) for info in tensors)

    def view(self, info: TensorInfo, headers: Mapping[str, Header]) -> torch.Tensor:
        """As `Storage`; its file holds nothing else."""
        from moe_svd_distill.checkpoints.tensors import tensor_view

        descriptor, path = self._tensors.open(self._file_of(info), info)
        try:
            return tensor_view(descriptor, replace(info, file=path, offset=0))
        finally:
            os.close(descriptor)

    def extracts(self, wanted: Sequence[Extract]) -> list[bytes]:
        """As `Storage`; small tensors are fetched and kept."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(lambda each: self._extract(*each), wanted))

    def _extract(self, info: TensorInfo, begin: int, count: int) -> bytes:
        file = self._file_of(info)
        if not count:
            return b""
        if info.bytes > _SMALL * count and not self._tensors.has(file, info):
            return self._source.read(file, info.offset + begin, info.offset + begin + count)[0]
        descriptor, path = self._tensors.open(file, info)
        try:
            return read_at(descriptor, path, begin, count)
        finally:
            os.close(descriptor)

    def _header(self, name: str) -> Header | DistillError:
        """As it was fetched when the model was opened first."""
        try:
            raw = read_small(self.directory / _HEADERS / name)
            return header_of(raw, self.directory / name, self.sizes[name])
        except DistillError as fault:
            return fault
        except KeyError:
            return MissingInputError(f"the weights file {shown(name)} of {self.address} is missing", _BEGIN_AGAIN)

    @cached_property
    def _tensors(self) -> FetchedTensors:
        def read(name: str, begin: int, end: int) -> tuple[bytes, int]:
            return self._source.read(name, begin, end)

        return FetchedTensors(self.directory / _TENSORS, read, self.room)

    @cached_property
    def _source(self) -> Source:
        return open_source(self.address, self.revision)

    def _file_of(self, info: TensorInfo) -> str:
        return info.file.relative_to(self.directory).as_posix()


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
        if isinstance(source, Snapshot) and source.unreachable is not None:
            raise source.unreachable
        known = _made(folder, source, room)
    elif isinstance(source, Snapshot):
        note = source.cache_note
    if room not in (None, known.room):
        known.room = room
        known.write_record()
    return folder, note


def _place(source: Source) -> Path:
    from huggingface_hub.constants import HF_HOME

    name = re.sub(r"[^A-Za-z0-9._-]+", "--", source.address.partition("@")[0].replace("://", "--"))
    kind = _HUB if isinstance(source, Snapshot) else _STORE
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
        raw, size = fetched_header(partial(source.read, name), folder / name)
        _write(folder / _HEADERS / name, raw)
        return size

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        sizes = dict(zip(files, pool.map(header, files), strict=True))
    made = RemoteFolder(
        folder, address=source.address, revision=source.revision, sizes=sizes, names=source.names, room=room
    )
    made.write_record()
    return made


def _write(path: Path, raw: bytes) -> None:
    make_folder(path.parent)
    with durable_file(path) as sink:
        sink.write(raw)
