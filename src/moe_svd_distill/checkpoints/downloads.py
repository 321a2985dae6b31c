"""How far a download of the hub's library has come: told by the files in its cache, which grow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

OnBytes: TypeAlias = Callable[[int, int], object]
"""Told the bytes that are here and all bytes, from a thread of its own."""

LOOK_S = 0.5


@contextmanager
def watched(snapshot: Path, sizes: Mapping[str, int], on_bytes: OnBytes | None) -> Iterator[None]:
    """Tell of files on their way into a snapshot of the hub's cache, until the end of the block.

    Args:
        snapshot: The snapshot's folder.
        sizes: Name to bytes of each file.
        on_bytes: Told twice a second, and at the end.
    """
    missing = any(not (snapshot / name).exists() for name in sizes)
    if on_bytes is None or not missing:
        yield
        return
    total, ended = sum(sizes.values()), threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            on_bytes(min(total, _arrived(snapshot, sizes)), total)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    on_bytes(total, total)


def _arrived(snapshot: Path, sizes: Mapping[str, int]) -> int:
    """Whole files are linked into the snapshot; those on their way lie beside the others as ``….incomplete``."""
    whole = sum(size for name, size in sizes.items() if (snapshot / name).exists())
    parts = (snapshot.parent.parent / "blobs").glob("*.incomplete")
    return whole + sum(_size(part) for part in parts)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it is whole by now, and has another name
        return 0
