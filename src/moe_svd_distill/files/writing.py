"""Files and folders that are either whole or absent, whatever kills the process that writes them.

``safetensors.save_file`` sets the full size, writes, and renames without an fsync, so that a crash can leave a file
that opens and holds zeros. Every file goes through `durable_file` instead: a temporary with a unique name in the same
folder, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import CannotWriteError

_TEMPORARY = re.compile(r"\.tmp~(?P<host>[^~]+)~(?P<pid>\d+)~[0-9a-f]+")
# Colleagues on a shared disk must be able to read an adapter, whatever the library's default is.
_MODE, _FOLDER_MODE = 0o644, 0o755
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


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or absent.

    File names that are no text are written as escapes, which JSON reads as the same names.

    Raises:
        CannotWriteError: The disk is full or the folder cannot be written to.
    """
    with durable_file(path) as sink:
        sink.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or absent. Figures that JSON has no word for (NaN, infinity) become null.

    Raises:
        CannotWriteError: The disk is full or the folder cannot be written to.
    """
    write_text(path, json_text(_expressible(value), allow_nan=False))


def json_text(value: Any, *, allow_nan: bool = True) -> str:
    """JSON as all files have it: indented, keys in their order, letters as they are."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"


def _expressible(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _expressible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_expressible(item) for item in value]
    return value


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` when the block ends without an error.

    Raises:
        CannotWriteError: ``path`` exists and is not an empty folder, or the operating system refuses to write.
    """
    path = path.absolute()
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise CannotWriteError(f"{path} exists and is not an empty folder", "Give another output folder")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".writing", dir=path.parent))
        yield temporary
        temporary.chmod(_FOLDER_MODE)
        sync_folder(temporary)
        temporary.replace(path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror or type(error).__name__}"
        raise explain_writing(error, path, opening=True) or CannotWriteError(
            reason, "Free space, or give another output"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


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


def explain_writing(
    error: BaseException, target: Path | str, *, opening: bool = False, action: str = ""
) -> CannotWriteError | None:
    """Turn a failure to write into the one line a user needs, or None when it is another kind of failure.

    A library may report a full disk in the text of an exception of its own, so the text counts as well as the number.

    Args:
        error: The failure.
        target: What cannot be written.
        opening: Whether a folder that is not there or refuses counts as well.
        action: What to do about it; by default what makes room for an output.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in _DISK_FULL or "no space left on device" in str(error).lower():
        return CannotWriteError(
            f"Cannot write {target}: the disk is full",
            action or "Free some space and run the same command again; finished parts are kept",
        )
    if number == errno.EFBIG:
        return CannotWriteError(
            f"Cannot write {target}: the file would exceed the largest size allowed here",
            action or "Raise the limit (ulimit -f) or choose another --output, then run the same command again",
        )
    if number == errno.EROFS or (opening and number in _REFUSED):
        reason = os.strerror(number) if number is not None else str(error)
        what = f"Cannot write {target}: {reason}"
        return CannotWriteError(what, action or "Check the folder or choose another --output")
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
