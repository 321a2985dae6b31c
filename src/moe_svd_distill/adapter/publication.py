"""Files and folders that appear whole or not at all: built under another name, forced to disk, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moe_svd_distill.errors import CannotWriteError

FILE_MODE = 0o644
FOLDER_MODE = 0o755


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content replaces ``path`` when the block ends without an error.

    Raises:
        CannotWriteError: The operating system refuses to write.
    """

    def make(prefix: str, suffix: str) -> Path:
        descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        os.close(descriptor)
        return Path(name)

    with _becoming(path, make, Path.unlink) as temporary, temporary.open("wb") as stream:
        yield stream
        stream.flush()
        os.fchmod(stream.fileno(), FILE_MODE)
        os.fsync(stream.fileno())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` when the block ends without an error.

    Raises:
        CannotWriteError: ``path`` exists and is not an empty folder, or the operating system refuses to write.
    """
    path = path.absolute()
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise CannotWriteError(f"{path} exists and is not an empty folder", "Give another output folder")

    def make(prefix: str, suffix: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=path.parent))

    with _becoming(path, make, lambda temporary: shutil.rmtree(temporary, ignore_errors=True)) as temporary:
        yield temporary
        temporary.chmod(FOLDER_MODE)
        flush_folder(temporary)


@contextmanager
def _becoming(path: Path, make: Callable[[str, str], Path], remove: Callable[[Path], None]) -> Iterator[Path]:
    """Something new beside ``path`` that takes its place when the block ends without an error, and else is removed.

    Args:
        path: Where it belongs.
        make: Makes it, given the beginning and the end of its temporary name.
        remove: Removes it.

    Raises:
        CannotWriteError: The operating system refuses to write.
    """
    temporary: Path | None = None
    try:
        temporary = make(f".{path.name}.", ".writing")
        yield temporary
        temporary.replace(path)
        temporary = None
        flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                remove(temporary)


def flush_folder(folder: Path) -> None:
    """Force a folder's entries to disk, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> CannotWriteError:
    """The failure of the operating system in the words of this project."""
    return CannotWriteError(
        f"{path} cannot be written: {error.strerror or type(error).__name__}", "Free space, or give another output"
    )
