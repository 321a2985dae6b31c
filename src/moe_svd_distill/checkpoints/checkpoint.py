"""A model's tensors as a read-only mapping, with their bytes on demand."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moe_svd_distill.checkpoints.checks import Survey, survey
from moe_svd_distill.checkpoints.faults import raise_faults, shown
from moe_svd_distill.checkpoints.files import FETCH_AGAIN, locate, open_regular, read_at, read_small
from moe_svd_distill.checkpoints.header import Header, TensorInfo, raw_header
from moe_svd_distill.checkpoints.layout import CONFIG
from moe_svd_distill.errors import BadDataError

if TYPE_CHECKING:
    import torch

MIB = 1024 * 1024
COMMIT = re.compile(r"[0-9a-f]{40}")


class Checkpoint(Mapping[str, TensorInfo]):
    """A read-only mapping from tensor name to what its header says, and the way to its bytes.

    The headers are read and checked at the first use; a checkpoint with a fault raises then. Files are opened when one
    of their tensors is read first, and stay open until :meth:`close`. A checkpoint may be sent to another process: it
    reads the headers there again, and refuses files that are not the same any more. Reading from several threads is
    safe.
    """

    def __init__(self, folder: Path, source: str | None = None, *, known: Survey | None = None) -> None:
        self.folder = folder.absolute()
        self.source = str(folder) if source is None else source
        self._survey = known
        self._expected: dict[str, tuple[int, str]] | None = None
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.RLock()

    def check(self) -> None:
        """Read and check every header now, instead of at the first use."""
        self._sound()

    @property
    def config(self) -> dict[str, Any]:
        """The model's ``config.json``."""
        return self._sound().config

    @property
    def commit(self) -> str | None:
        """The commit that a hub model is pinned to, or ``None`` for a folder that does not come from the hub."""
        is_snapshot = self.folder.parent.name == "snapshots" and COMMIT.fullmatch(self.folder.name)
        return self.folder.name if is_snapshot else None

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors together, from the headers."""
        return sum(info.bytes for info in self.values())

    def __getitem__(self, name: str) -> TensorInfo:
        return self._sound().tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sound().tensors)

    def __len__(self) -> int:
        return len(self._sound().tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r})"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def read(self, name: str, *, device: str | torch.device = "cpu") -> torch.Tensor:
        """The tensor in the dtype it is stored in.

        On the CPU it is a private view on the file: nothing is copied, and a change made in place stays in this one
        tensor. On another device it is a copy there.
        """
        info = self._sound().tensors.get(name)
        if info is None:
            raise BadDataError(f"{self.source} has no tensor {shown(name)}", "Check the names with `inspect`")
        from moe_svd_distill.checkpoints.tensors import tensor_view

        with self._lock:  # the descriptor must not be closed by another thread before the file is mapped
            descriptor = self._open(info)
            tensor = tensor_view(descriptor, info)
        return tensor if str(device) == "cpu" else tensor.to(device)

    def fingerprint(self) -> str:
        """A digest that changes when the model does: sizes, headers, first and last MiB of each file, ``config.json``.

        It is taken from the files as they are now, so that a model replaced during a run is noticed.
        """
        digest = hashlib.sha256(b"checkpoint fingerprint 1\n")

        def add(piece: bytes) -> None:
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)

        add(read_small(locate(self.folder, CONFIG)))
        for name in sorted(self._sound().headers):
            path = locate(self.folder, name)
            descriptor = open_regular(path)
            try:
                size = os.fstat(descriptor).st_size
                add(name.encode())
                add(str(size).encode())
                add(hashlib.sha256(raw_header(descriptor, path, size)).digest())
                add(read_at(descriptor, path, 0, min(MIB, size)))
                add(read_at(descriptor, path, max(0, size - MIB), min(MIB, size)))
            finally:
                os.close(descriptor)
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files; tensors that were read stay valid, and a later read opens the files again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptors", None):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        headers = self._sound().headers
        expected = {name: (header.file_bytes, header.digest) for name, header in headers.items()}
        return {"folder": self.folder, "source": self.source, "expected": expected}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Checkpoint.__init__(self, state["folder"], state["source"])
        self._expected = state["expected"]

    def _sound(self) -> Survey:
        """The headers, read once, or the error that names all that is wrong with them."""
        if self._survey is None:
            with self._lock:
                if self._survey is None:
                    found = survey(self.folder)
                    raise_faults(found.faults)
                    self._compare(found.headers)
                    self._survey = found
        return self._survey

    def _compare(self, headers: dict[str, Header]) -> None:
        """In another process: the files have to be the same as where this checkpoint came from."""
        if self._expected is None:
            return
        found = {name: (header.file_bytes, header.digest) for name, header in headers.items()}
        for name in sorted(self._expected.keys() | found.keys()):
            if self._expected.get(name) != found.get(name):
                raise _changed(self.folder / name)

    def _open(self, info: TensorInfo) -> int:
        """The descriptor of the tensor's file, opened once; a file that was cut off or replaced is refused."""
        descriptor = self._descriptors.get(info.file)
        if descriptor is None:
            header = self._sound().headers[info.file.relative_to(self.folder).as_posix()]
            descriptor = open_regular(info.file)
            try:
                size = os.fstat(descriptor).st_size
                same = size == header.file_bytes
                raw = raw_header(descriptor, info.file, size) if same else b""
                if hashlib.sha256(raw).hexdigest() != header.digest:
                    raise _changed(info.file)
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptors[info.file] = descriptor
        size = os.fstat(descriptor).st_size
        if size < info.offset + info.bytes:
            what = f"{shown(info.file)} was cut off: found {size} bytes, expected {info.offset + info.bytes}"
            raise BadDataError(f"{what} for tensor {shown(info.name)}", FETCH_AGAIN)
        return descriptor


def _changed(path: Path) -> BadDataError:
    what = f"{shown(path)} is not the file that was checked any more"
    return BadDataError(what, "Leave the model alone during a run, and start again")
