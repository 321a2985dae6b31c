"""The output folder: who may write to it, and when what lies in it counts as an adapter.

A folder with ``run.json`` holds a published adapter, and ``run.json`` is the last file to arrive. Everything is built
under ``.staged`` and moved into place by renames, so a reader never meets half a file; an older adapter is withdrawn by
renaming its ``run.json`` first, so a reader never meets old tensors beside a new configuration and takes them for one.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from moe_svd_distill.errors import CannotWriteError
from moe_svd_distill.files.names import (
    ADAPTER_FILE,
    CACHE_FOLDER,
    CARD_FILE,
    CONFIGURATION_FILE,
    LOCK_FILE,
    PARTS_FOLDER,
    RECORD_FILE,
)
from moe_svd_distill.files.writing import (
    explain_writing,
    is_temporary,
    make_folder,
    remove_stale_temporaries,
    sync_file,
    sync_folder,
)

_OVERWRITTEN = (ADAPTER_FILE, CONFIGURATION_FILE, CARD_FILE)
_WITHDRAWN = f".withdrawn-{RECORD_FILE}"


class OutputFolder:
    """The folder of one adapter, used by one run at a time: enter it before touching anything inside.

    Args:
        path: The folder; created when entered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path / LOCK_FILE
        self._lock = FileLock(self._lock_path, blocking=False)

    @property
    def parts(self) -> Path:
        """Where the parts lie."""
        return self.path / PARTS_FOLDER

    @property
    def cache(self) -> Path:
        """Where the states of streamed models lie, unless a run was told of another folder."""
        return self.path / CACHE_FOLDER

    @property
    def published(self) -> bool:
        """Whether a complete adapter lies here."""
        return (self.path / RECORD_FILE).is_file()

    def __enter__(self) -> OutputFolder:
        make_folder(self.path)
        self._refuse_foreign_files()
        self._acquire()
        try:
            make_folder(self.parts)
            for left_behind in _files(self._staging):
                left_behind.unlink()
            remove_stale_temporaries(self.path)
            remove_stale_temporaries(self.parts)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def staged(self, name: str) -> Path:
        """Where to write the file that `publish` will call ``name``."""
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not the name of a file in the folder")
        make_folder(self._staging)
        return self._staging / name

    def publish(self, stale: Iterable[str] = ()) -> list[str]:
        """Move all staged files into place, the configuration and then the manifest last.

        A run that is killed within leaves a folder without a manifest, which the same command completes.

        Args:
            stale: Names of files of an older adapter that must not lie beside this one.

        Returns:
            Those of them that were there.

        Raises:
            CannotWriteError: The folder cannot be written to.
            ValueError: No manifest has been staged.
        """
        if not self.staged(RECORD_FILE).is_file():
            raise ValueError(f"{RECORD_FILE} has not been staged")
        files = [path for path in _files(self._staging) if not is_temporary(path)]
        files.sort(key=lambda path: (path.name == RECORD_FILE, path.name == CONFIGURATION_FILE, path.name))
        try:
            for file in files:
                sync_file(file)
            if self.published:
                (self.path / RECORD_FILE).replace(self.path / _WITHDRAWN)
                sync_folder(self.path)
            old = [name for name in stale if (self.path / name).is_file()]
            for name in old:
                (self.path / name).unlink()
            for file in files[:-1]:
                file.replace(self.path / file.name)
            sync_folder(self.path)
            files[-1].replace(self.path / RECORD_FILE)
            sync_folder(self.path)
            (self.path / _WITHDRAWN).unlink(missing_ok=True)
            with suppress(OSError):
                self._staging.rmdir()
            return old
        except OSError as error:
            raise explain_writing(error, self.path, opening=True) or error from error

    def resumable(self) -> str:
        """What earlier runs have finished, in words; empty if there is nothing."""
        parts = [path for path in _files(self.parts) if path.name.startswith("part-") and path.suffix == ".safetensors"]
        states = [path for path in _files(self.cache) if path.name.startswith("states-")]
        counted = ((len(parts), "finished parts"), (len(states), "files of hidden states"))
        return ", ".join(f"{count} {name}" for count, name in counted if count)

    def cleanable(self) -> list[Path]:
        """What `clean` would delete: parts, states, rejected ones, and what killed runs left behind; not the adapter.

        A cache that lies elsewhere, even if a link in the folder leads to it, serves other runs as well and stays.
        """
        found = [path for path in (self.path / _WITHDRAWN,) if path.is_file()]
        found += [path for path in _files(self.parts) if path.name.startswith("part-") or is_temporary(path)]
        found += [path for path in _files(self.path) if is_temporary(path)]
        if not self.cache.is_symlink():
            found += [
                path
                for path in _files(self.cache)
                if path.name.startswith(("states-", "inputs-", "completions-")) or is_temporary(path)
            ]
        return found + _files(self._staging)

    def clean(self) -> list[Path]:
        """Delete the working files, and nothing that is not known to be one.

        Nothing else deletes the parts of units. The folder need not be entered.

        Returns:
            What was deleted.

        Raises:
            CannotWriteError: A run is using the folder, or its files cannot be deleted.
        """
        if not self.cleanable():
            return []
        self._acquire()
        try:
            doomed = self.cleanable()
            for path in doomed:
                path.unlink()
            for folder in (self.parts, self._staging, self.cache):
                if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                    folder.rmdir()
        except OSError as error:
            raise explain_writing(error, self.path, opening=True) or error from error
        finally:
            self._lock.release()
        return doomed

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise CannotWriteError(
                f"{self.path} is in use by another run", "Wait until it ends, or choose another --output"
            ) from error
        except OSError as error:
            raise explain_writing(error, self.path, opening=True) or error from error

    def _refuse_foreign_files(self) -> None:
        """A folder that no run has ever used may hold someone's adapter; it is not for us to write over it."""
        if self._lock_path.exists() or self.published:
            return
        for name in _OVERWRITTEN:
            if (self.path / name).exists():
                raise CannotWriteError(
                    f"{self.path} holds a {name} that this program did not write", "Choose another --output"
                )

    @property
    def _staging(self) -> Path:
        return self.path / ".staged"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
