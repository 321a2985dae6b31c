"""The tensors of a remote model on this machine: each in a file of its own, fetched once, the oldest let go of first.

A file that is there is whole. A tensor on its way grows in a ``.part`` beside it that one process at a time may write
to, under a lock; whoever comes next goes on where it stopped. Where room is needed, a part that nobody holds the lock
of goes as a whole file does. A file that is let go of while it is mapped stays readable until then.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from threading import BoundedSemaphore, Condition

from moe_svd_distill.errors import RemoteError, UsageError, shown
from moe_svd_distill.files.header import TensorInfo
from moe_svd_distill.files.writing import explain_writing

Read = Callable[[str, int, int], tuple[bytes, int]]
"""Bytes of a file from one offset to another, and the file's size."""

CONNECTIONS = 8
PIECE_BYTES = 8 << 20
"""Asked for at a time."""
_AHEAD = 4
"""Pieces of one tensor that are asked for at a time."""
_PART = ".part"
_LOOK_AGAIN = 1 / 32
"""Share of the room that may be filled before all files are counted again: other processes fill it too."""
_FULL = 7 / 8
"""Share of the room that one process fills; the rest is for what the others do not know of yet."""
_FREED = 1 / 8
"""Share of the room that is freed at a time."""
_MAKE_ROOM = "Make room, keep less (remote_cache_gb), or point HF_HOME to another disk"


class FetchedTensors:
    """A folder of fetched tensors.

    Args:
        folder: Where they lie.
        read: How to read a part of a remote file.
        room: Bytes they may take; None for as much as there is.
    """

    def __init__(self, folder: Path, read: Read, room: int | None = None) -> None:
        self._folder, self._read, self._room = folder, read, room
        self._connections, self._changed = BoundedSemaphore(CONNECTIONS), Condition()
        self._counted: int | None = None
        self._since = self._coming = 0

    def open(self, name: str, info: TensorInfo) -> tuple[int, Path]:
        """A descriptor of the file that holds a tensor of a weights file and nothing else, and its path.

        Raises:
            RemoteError: It cannot be fetched.
            CannotWriteError: There is no room for it.
        """
        while True:
            path = self._fetched(name, info)
            with suppress(FileNotFoundError):  # let go of by another process meanwhile
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC), path

    def has(self, name: str, info: TensorInfo) -> bool:
        """Whether a tensor is there."""
        return self._path(name, info).exists()

    def fetch(self, tensors: Iterable[tuple[str, TensorInfo]]) -> None:
        """Fetch several at a time what is not there, up to half of the room: the rest would push out the first."""
        absent, left = [], None if self._room is None else self._room // 2
        for name, info in tensors:
            if left is not None:
                left -= info.bytes
                if left < 0:
                    break
            if not self.has(name, info):
                absent.append((name, info))
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch") as pool:
            for _ in pool.map(lambda tensor: self._fetched(*tensor), absent):
                pass

    def _path(self, name: str, info: TensorInfo) -> Path:
        return self._folder / name / f"{info.offset}-{info.bytes}"

    def _fetched(self, name: str, info: TensorInfo) -> Path:
        path = self._path(name, info)
        if not self._touched(path):
            try:
                self._fetch(path, name, info)
            except OSError as error:
                raise explain_writing(error, path, opening=True, action=_MAKE_ROOM) or error from error
        return path

    @staticmethod
    def _touched(path: Path) -> bool:
        """Whether a file is there, which then counts as the youngest."""
        try:
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _fetch(self, path: Path, name: str, info: TensorInfo) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + _PART)
        descriptor = _locked(part)
        try:
            if self._touched(path):  # by whoever held the lock
                return
            done = os.fstat(descriptor).st_size
            if done > info.bytes:
                os.ftruncate(descriptor, done := 0)
            with self._room_for(info.bytes - done):
                for piece in self._pieces(name, info.offset + done, info.offset + info.bytes):
                    os.pwrite(descriptor, piece, done)
                    done += len(piece)
                os.fsync(descriptor)
                part.rename(path)
        finally:
            os.close(descriptor)

    def _pieces(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes in order, some asked for ahead."""
        begins = iter(range(begin, end, PIECE_BYTES))
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="pieces") as pool:

            def ask(first: int) -> Future[bytes]:
                return pool.submit(self._piece, name, first, min(first + PIECE_BYTES, end))

            asked = deque(ask(first) for first in islice(begins, _AHEAD))
            while asked:
                yield asked.popleft().result()
                asked.extend(ask(first) for first in islice(begins, 1))

    def _piece(self, name: str, begin: int, end: int) -> bytes:
        with self._connections:
            found, _ = self._read(name, begin, end)
        if len(found) != end - begin:
            raise RemoteError(f"found {len(found)} bytes of {shown(name)}, expected {end - begin}", "Try again later")
        return found

    @contextmanager
    def _room_for(self, wanted: int) -> Iterator[None]:
        """Room for so many bytes that are about to come; the tensors that were used longest ago make it."""
        if self._room is None:
            yield
            return
        if wanted > self._room:
            raise UsageError(
                f"a tensor takes {wanted:,} bytes, and {self._room:,} may be kept of a remote model (remote_cache_gb)",
                "Allow more",
            )
        with self._changed:
            while not self._fits(wanted, self._room):
                self._changed.wait()
            self._coming += wanted
        try:
            yield
        finally:
            with self._changed:
                self._coming -= wanted
                self._since += wanted
                self._changed.notify_all()

    def _fits(self, wanted: int, room: int) -> bool:
        limit, coming = max(wanted, int(_FULL * room)), self._coming + wanted
        if self._counted is None or self._since + coming > min(limit - self._counted, _LOOK_AGAIN * room):
            files = self._files()
            counted = sum(size for _, size, _ in files)
            if counted + coming > limit:
                for _, size, path in files:
                    if counted + coming <= limit - _FREED * room:
                        break
                    if _let_go_of(path):
                        counted -= size
            self._counted, self._since = counted, 0
        return self._counted + self._since + coming <= limit or self._coming == 0

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each was used last, its size, and where it is; the oldest first."""
        found = []
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = Path(folder) / name
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
        return sorted(found)


def _locked(part: Path) -> int:
    """A descriptor of a file that nobody else writes to, and that is still there."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), part.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it became the whole file, or went


def _let_go_of(path: Path) -> bool:
    """Remove a file, unless it is a part that somebody writes to."""
    if path.suffix != _PART:
        path.unlink(missing_ok=True)
        return True
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if mine := os.path.samestat(os.fstat(descriptor), path.stat()):
            path.unlink()
        return mine
    except (BlockingIOError, FileNotFoundError):  # is written to, or became the whole file
        return False
    finally:
        os.close(descriptor)
