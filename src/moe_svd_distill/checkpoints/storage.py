"""Where the bytes of a model lie: in the files of a folder, in GGUF files, or elsewhere, to be read by range."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moe_svd_distill.checkpoints.configuration import configuration_files
from moe_svd_distill.checkpoints.identity import Extract, cache_key, digest_of
from moe_svd_distill.checkpoints.remote.folder import RemoteFolder
from moe_svd_distill.checkpoints.shards import GGUF
from moe_svd_distill.checkpoints.survey import Survey, survey
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.header import Header, TensorInfo
from moe_svd_distill.files.reading import FETCH_AGAIN, locate, open_regular, opened, read_at, read_small

if TYPE_CHECKING:
    import torch


class Storage(Protocol):
    """The bytes of one model. Reading from several threads is safe.

    Attributes:
        directory: What the names of its weights files are relative to.
        is_gguf: Whether those are GGUF files.
        is_remote: Whether tensors are fetched as they are read.
    """

    directory: Path
    is_gguf: bool
    is_remote: bool

    def survey(self, source: str, *, as_stored: bool) -> Survey:
        """What the headers say now, with all that is wrong with them; `source` is what the model is called."""

    def folder(self, found: Survey) -> Path:
        """Where configuration and tokenizer lie.

        Raises:
            BadDataError: No tokenizer can be made of a GGUF file.
        """

    def cache_key(self, headers: Mapping[str, Header]) -> str:
        """A digest that changes when any byte of the model may have."""

    def is_readable(self, tensors: Iterable[TensorInfo]) -> bool:
        """Whether these can be read."""

    def prefetch(self, tensors: Iterable[TensorInfo]) -> None:
        """Fetch what is not on this machine, several at a time."""

    def view(self, info: TensorInfo, headers: Mapping[str, Header]) -> torch.Tensor:
        """A stored tensor as a view on its file, which must have this header still."""

    def extracts(self, wanted: Sequence[Extract]) -> Iterable[bytes]:
        """Bytes of tensors."""

    def close(self) -> None:
        """Close all files; a later read opens them again."""


def storage_at(place: Path) -> Storage:
    """The storage of a folder or a GGUF file.

    Raises:
        BadDataError: The folder is that of a remote model, and its record is damaged.
    """
    if place.suffix.lower() == GGUF:
        return GgufFiles(place)
    remote = RemoteFolder.of(place)
    return FolderFiles(place) if remote is None else RemoteFiles(remote)


class FolderFiles:
    """Safetensors files in a folder."""

    is_gguf = is_remote = False

    def __init__(self, folder: Path) -> None:
        """Nothing is opened yet."""
        self.directory, self._place = folder, folder
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.RLock()

    def survey(self, source: str, *, as_stored: bool) -> Survey:
        """As `Storage`."""
        return survey(self._place, as_stored=as_stored, source=source)

    def folder(self, found: Survey) -> Path:
        """As `Storage`."""
        return self._place

    def cache_key(self, headers: Mapping[str, Header]) -> str:
        """As `Storage`: of the files as they are now."""
        return cache_key(headers, {name: locate(self._place, name) for name in headers}, _configuration(self._place))

    def is_readable(self, tensors: Iterable[TensorInfo]) -> bool:
        """As `Storage`: of a model of which only the headers were fetched, none can."""
        return all(file.exists() for file in {info.file for info in tensors})

    def prefetch(self, tensors: Iterable[TensorInfo]) -> None:
        """As `Storage`."""

    def view(self, info: TensorInfo, headers: Mapping[str, Header]) -> torch.Tensor:
        """As `Storage`."""
        from moe_svd_distill.checkpoints.tensors import tensor_view

        with self._lock:  # the descriptor must not be closed by another thread before the file is mapped
            return tensor_view(self._open(info, headers), info)

    def extracts(self, wanted: Sequence[Extract]) -> Iterator[bytes]:
        """As `Storage`."""
        for info, begin, count in wanted:
            with opened(info.file) as descriptor:
                yield read_at(descriptor, info.file, info.offset + begin, count)

    def close(self) -> None:
        """As `Storage`."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _open(self, info: TensorInfo, headers: Mapping[str, Header]) -> int:
        """The descriptor of the tensor's file, opened once; a file that was cut off or replaced is refused."""
        descriptor = self._descriptors.get(info.file)
        if descriptor is None:
            header = headers[info.file.relative_to(self.directory).as_posix()]
            descriptor = open_regular(info.file)
            try:
                size = os.fstat(descriptor).st_size
                raw = read_at(descriptor, info.file, 0, header.size) if size == header.file_bytes else b""
                if hashlib.sha256(raw).hexdigest() != header.digest:
                    raise changed(info.file)
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptors[info.file] = descriptor
        size = os.fstat(descriptor).st_size
        if size < info.offset + info.bytes:
            what = f"{shown(info.file)} was cut off: found {size} bytes, expected {info.offset + info.bytes}"
            raise BadDataError(f"{what} for tensor {shown(info.name)}", FETCH_AGAIN)
        return descriptor

    def __del__(self) -> None:
        if getattr(self, "_descriptors", None):
            self.close()


class GgufFiles(FolderFiles):
    """One GGUF file, or several that belong together."""

    is_gguf = True

    def __init__(self, file: Path) -> None:
        """Nothing is opened yet."""
        super().__init__(file)
        self.directory = file.parent

    def survey(self, source: str, *, as_stored: bool) -> Survey:
        """As `Storage`."""
        from moe_svd_distill.checkpoints.llama_cpp.survey import survey_gguf

        return survey_gguf(self._place, source, as_stored=as_stored)

    def folder(self, found: Survey) -> Path:
        """As `Storage`: made, and gone with the process."""
        from moe_svd_distill.checkpoints.llama_cpp.folder import model_folder

        return model_folder(self._place, found.headers[self._place.name].digest, found.config)

    def cache_key(self, headers: Mapping[str, Header]) -> str:
        """As `Storage`; the configuration is in the header."""
        return cache_key(headers, {name: header.file for name, header in headers.items()}, ())


class RemoteFiles:
    """Weights files that are elsewhere."""

    is_gguf, is_remote = False, True

    def __init__(self, remote: RemoteFolder) -> None:
        """What is kept of them on this machine."""
        self.directory, self._remote = remote.folder, remote

    def survey(self, source: str, *, as_stored: bool) -> Survey:
        """As `Storage`: of the headers that were fetched when the model was opened first."""
        remote = self._remote
        return survey(
            remote.folder,
            remote.names,
            remote.headers,
            small_tensor=remote.beginning,
            as_stored=as_stored,
            source=source,
        )

    def folder(self, found: Survey) -> Path:
        """As `Storage`."""
        return self._remote.folder

    def cache_key(self, headers: Mapping[str, Header]) -> str:
        """As `Storage`: of the address, the revision, and the headers."""
        named = (self._remote.address, self._remote.revision, *(header.digest for header in headers.values()))
        return digest_of([*(name.encode() for name in named), *_configuration(self._remote.folder)])

    def is_readable(self, tensors: Iterable[TensorInfo]) -> bool:
        """As `Storage`."""
        return True

    def prefetch(self, tensors: Iterable[TensorInfo]) -> None:
        """As `Storage`."""
        self._remote.fetch(tensors)

    def view(self, info: TensorInfo, headers: Mapping[str, Header]) -> torch.Tensor:
        """As `Storage`; its file holds nothing else."""
        from moe_svd_distill.checkpoints.tensors import tensor_view

        descriptor, path = self._remote.open(info)
        try:
            return tensor_view(descriptor, replace(info, file=path, offset=0))
        finally:
            os.close(descriptor)

    def extracts(self, wanted: Sequence[Extract]) -> list[bytes]:
        """As `Storage`."""
        return self._remote.extracts(wanted)

    def close(self) -> None:
        """As `Storage`."""


def changed(path: Path) -> BadDataError:
    """The refusal of a file that is another than the one whose header was checked."""
    what = f"{shown(path)} is not the file that was checked any more"
    return BadDataError(what, "Leave the model alone during a run, and start again")


def _configuration(folder: Path) -> list[bytes]:
    return [read_small(locate(folder, name)) for name in configuration_files(folder)]
