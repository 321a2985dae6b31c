"""Files and folders that appear whole or not at all: built under another name, forced to disk, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
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
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".writing", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), FILE_MODE)
            os.fsync(stream.fileno())
        temporary.replace(path)
        temporary = None
        flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


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
        temporary.chmod(FOLDER_MODE)
        flush_folder(temporary)
        temporary.replace(path)
        temporary = None
        flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


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
