"""Folders that appear whole or not at all: built under another name, forced to disk, then renamed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_svd_distill.errors import CannotWriteError
from moe_svd_distill.execution.durable import explain_writing, sync_folder

_MODE = 0o755


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
        temporary.chmod(_MODE)
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
