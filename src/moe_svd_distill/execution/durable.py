"""Files that are either whole or absent, whatever kills the process that writes them.

``safetensors.save_file`` sets the full size, writes, and renames without an fsync, so that a crash can leave a file
that opens and holds zeros. Everything this room writes goes through `durable_file` instead: a temporary with a unique
name in the same folder, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_svd_distill.errors import CannotWriteError

_TEMPORARY = re.compile(r"\.tmp~(?P<host>[^~]+)~(?P<pid>\d+)~[0-9a-f]+")
_MODE = 0o644  # colleagues on a shared disk must be able to read an adapter, whatever the library's default is
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}


class Sink:
    """The open end of a durable file: writes everything it is given and keeps the digest of it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Write all of ``data``; one call to the system may take only a part of it."""
        self._digest.update(data)
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    @property
    def sha256(self) -> str:
        """The digest of everything written so far."""
        return self._digest.hexdigest()


@contextmanager
def durable_file(path: Path) -> Iterator[Sink]:
    """Write ``path`` so that readers see the whole new file or what was there before.

    Raises:
        CannotWriteError: The disk is full, or the folder does not let itself be written to.
    """
    temporary = path.parent / f".tmp~{_host()}~{os.getpid()}~{secrets.token_hex(6)}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise explain_writing(error, path, opening=True) or error from error
    try:
        try:
            yield Sink(descriptor)
            os.fchmod(descriptor, _MODE)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        explained = explain_writing(error, path)
        if explained is None:
            raise
        raise explained from error


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync of a folder
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Put the bytes of a file that someone else wrote on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents.

    Raises:
        CannotWriteError: It cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CannotWriteError(f"{folder} is a file, expected a folder", "Choose another --output") from error
    except OSError as error:
        raise explain_writing(error, folder, opening=True) or error from error


def explain_writing(error: BaseException, target: Path, *, opening: bool = False) -> CannotWriteError | None:
    """Turn a failure to write into the one line a user needs, or None when it is another kind of failure.

    A library may report a full disk in the text of an exception of its own, so the text counts as well as the number.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in _DISK_FULL or "no space left on device" in str(error).lower():
        return CannotWriteError(
            f"Cannot write {target}: the disk is full",
            "Free some space and run the same command again; finished parts are kept",
        )
    if number == errno.EFBIG:
        return CannotWriteError(
            f"Cannot write {target}: the file would exceed the largest size allowed here",
            "Raise the limit (ulimit -f) or choose another --output, then run the same command again",
        )
    if number == errno.EROFS or (opening and number in _REFUSED):
        reason = os.strerror(number) if number is not None else str(error)
        return CannotWriteError(f"Cannot write {target}: {reason}", "Check the folder or choose another --output")
    return None


def remove_stale_temporaries(folder: Path) -> int:
    """Remove what killed writers of this machine left behind; the files of living processes and other hosts stay.

    Returns:
        How many were removed.
    """
    removed = 0
    for path in folder.glob(".tmp~*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and match["host"] == _host() and not _is_alive(int(match["pid"])):
            with suppress(OSError):
                path.unlink()
                removed += 1
    return removed


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is named like an unfinished durable file."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in (b"Z", b"X")  # a container without an init keeps its dead for ever


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname()) or "host"
