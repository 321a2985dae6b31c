"""Where the bytes of a model lie: in the files of a folder, in GGUF files, or elsewhere, to be read by range."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.checkpoints.configuration import configuration_files
from moe_svd_distill.checkpoints.identity import Extract, cache_key
from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, shown
from moe_svd_distill.files.header import Header, TensorInfo, read_header
from moe_svd_distill.files.reading import FETCH_AGAIN, explain, locate, open_regular, opened, read_at, read_small

if TYPE_CHECKING:
    import torch


class Storage:
    """The bytes of one model: safetensors files in a folder. Reading from several threads is safe.

    Attributes:
        directory: What the names of its weights files are relative to.
        is_gguf: Whether those are GGUF files.
        is_remote: Whether tensors are fetched as they are read.
    """

    is_gguf = is_remote = False

    def __init__(self, place: Path, directory: Path | None = None) -> None:
        """Nothing is opened yet."""
        self.directory, self._place = directory or place, place
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.RLock()

    def file_names(self) -> Sequence[str]:
        """The files of the model, sorted, so that the outcome does not depend on the file system's order."""
        try:
            return sorted(os.listdir(self._place))  # noqa: PTH208
        except OSError as error:
            raise explain(error, self._place) from error

    def headers(self, files: Sequence[str]) -> dict[str, Header | DistillError]:
        """The header of each weights file, or what is wrong with it."""
        return {name: self._header(name) for name in files}

    def beginning(self, info: TensorInfo, count: int) -> bytes | None:
        """The first bytes of a tensor; ``None`` where only the headers were fetched."""
        return next(iter(self.extracts([(info, 0, count)]))) if info.file.exists() else None

    def model_folder(self, headers: Mapping[str, Header], config: Mapping[str, object]) -> Path:
        """Where configuration and tokenizer lie.

        Raises:
            BadDataError: No tokenizer can be made of a GGUF file.
        """
        return self._place

    def cache_key(self, headers: Mapping[str, Header]) -> str:
        """A digest that changes when any byte of the model may have: of the files as they are now."""
        return cache_key(headers, {name: locate(self._place, name) for name in headers}, self._configuration())

    def is_readable(self, tensors: Iterable[TensorInfo]) -> bool:
        """Whether these can be read; of a model of which only the headers were fetched, none can."""
        return all(file.exists() for file in {info.file for info in tensors})

    def prefetch(self, tensors: Iterable[TensorInfo]) -> None:
        """Fetch what is not on this machine, several at a time."""

    def view(self, info: TensorInfo, headers: Mapping[str, Header]) -> torch.Tensor:
        """A stored tensor as a view on its file, which must have this header still."""
        from moe_svd_distill.checkpoints.tensors import tensor_view

        with self._lock:  # the descriptor must not be closed by another thread before the file is mapped
            return tensor_view(self._open(info, headers), info)

    def extracts(self, wanted: Sequence[Extract]) -> Iterable[bytes]:
        """Bytes of tensors."""
        for info, begin, count in wanted:
            with opened(info.file) as descriptor:
                yield read_at(descriptor, info.file, info.offset + begin, count)

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _header(self, name: str) -> Header | DistillError:
        try:
            return read_header(locate(self._place, name))
        except DistillError as fault:
            if os.path.lexists(self._place / name):
                return fault
            what = f"the weights file {shown(name)} of {shown(self._place)} is missing"
            return MissingInputError(what, FETCH_AGAIN)

    def _configuration(self) -> list[bytes]:
        return [read_small(locate(self._place, name)) for name in configuration_files(self._place)]

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


class GgufFiles(Storage):
    """One GGUF file, or several that belong together."""

    is_gguf = True

    def __init__(self, file: Path) -> None:
        """Nothing is opened yet."""
        super().__init__(file, file.parent)

    def model_folder(self, headers: Mapping[str, Header], config: Mapping[str, object]) -> Path:
        """As `Storage`: made, and gone with the process."""
        from moe_svd_distill.checkpoints.llama_cpp.folder import model_folder

        return model_folder(self._place, headers[self._place.name].digest, config)

    def cache_key(self, headers: Mapping[str, Header]) -> str:
        """As `Storage`; the configuration is in the header."""
        return cache_key(headers, {name: header.file for name, header in headers.items()}, ())


def changed(path: Path) -> BadDataError:
    """The refusal of a file that is another than the one whose header was checked."""
    what = f"{shown(path)} is not the file that was checked any more"
    return BadDataError(what, "Leave the model alone during a run, and start again")
