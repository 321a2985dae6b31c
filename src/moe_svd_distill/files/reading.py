"""Opening files that came from elsewhere: only regular ones, and only those that belong to the folder they are in."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, shown

MAX_JSON_BYTES = 256 * 1024 * 1024
FETCH_AGAIN = "Download or copy the model again"
LFS_POINTER = b"version https://git-lfs"
PIECE_BYTES = 4 << 20


def relative_name(name: object, said_by: str) -> str:
    """A file name read from an index, refused if it could lead out of the folder."""
    if not isinstance(name, str) or not name:
        raise BadDataError(f"{said_by} names a file {shown(name)} (expected a relative path as text)", FETCH_AGAIN)
    pieces = name.split("/")
    if name.startswith("/") or "\\" in name or ":" in pieces[0] or any(piece in ("", ".", "..") for piece in pieces):
        raise BadDataError(
            f"{said_by} names the file {shown(name)}, which is no plain path inside the model's folder", FETCH_AGAIN
        )
    if not name.isprintable():
        raise BadDataError(f"{said_by} names the file {shown(name)}, which has unprintable characters", FETCH_AGAIN)
    return name


def locate(folder: Path, name: str) -> Path:
    """The path of a file of the model, after checking that it is a regular file and belongs to the folder.

    A symbolic link may stay inside the folder, or lead from a snapshot of the hub's cache to that cache's blobs.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except OSError as error:
        raise explain(error, path) from error
    except RuntimeError as error:  # a loop of symbolic links, before Python 3.13
        raise BadDataError(f"{shown(path)} is a loop of symbolic links", FETCH_AGAIN) from error
    if not any(real.is_relative_to(home) for home in _homes(folder)):
        raise BadDataError(
            f"{shown(path)} is a link to {shown(real)}, outside the model's folder",
            "Copy the file into the folder, or give the folder that really holds it",
        )
    if not stat.S_ISREG(mode):
        raise BadDataError(f"{shown(path)} is not a regular file", "Replace it by the file itself")
    return path


def _homes(folder: Path) -> list[Path]:
    """The folders in which the model's files may really lie."""
    real = folder.resolve()
    homes = [real]
    if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir():
        homes.append((real.parent.parent / "blobs").resolve())
    return homes


def explain(error: OSError, path: Path) -> DistillError:
    """The failure of the operating system in the words of this project."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return MissingInputError(f"{shown(path)} is not there", "Give the folder of a complete model")
    if isinstance(error, PermissionError):
        return MissingInputError(f"{shown(path)} may not be read: permission denied", "Change its permissions")
    return BadDataError(f"{shown(path)} cannot be read: {error.strerror or type(error).__name__}", FETCH_AGAIN)


def open_regular(path: Path) -> int:
    """A file descriptor for reading a regular file; never blocks on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise explain(error, path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadDataError(f"{shown(path)} is not a regular file", "Replace it by the file itself")
    return descriptor


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file descriptor as `open_regular` gives it, closed at the end of the block."""
    descriptor = open_regular(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def pointer_to(path: Path) -> BadDataError:
    """The refusal of what git leaves in place of a large file where git-lfs is not installed."""
    what = f"{shown(path)} is a pointer of git-lfs, not the file it stands for"
    return BadDataError(what, "Run `git lfs install` and `git lfs pull` in its folder, or download the file")


def read_at(descriptor: int, path: Path, offset: int, count: int) -> bytes:
    """Exactly ``count`` bytes, or an error that names the file."""
    buffer = bytearray(count)
    fill(descriptor, path, offset, buffer)
    return bytes(buffer)


def read_pieces(descriptor: int, path: Path, begin: int, end: int) -> Iterator[memoryview]:
    """The bytes from ``begin`` to ``end`` of a file, in pieces that share one buffer.

    Plain reads and no memory map: a file that shrinks meanwhile is an error here and would be a SIGBUS there.
    """
    buffer = memoryview(bytearray(min(PIECE_BYTES, end - begin)))
    while begin < end:
        piece = buffer[: end - begin]
        fill(descriptor, path, begin, piece)
        begin += len(piece)
        yield piece


def fill(descriptor: int, path: Path, offset: int, buffer: bytearray | memoryview) -> None:
    """Fill the buffer from a file, or raise an error that names the file."""
    rest = memoryview(buffer)
    while rest:
        try:
            count = os.preadv(descriptor, [rest], offset)
        except OSError as error:
            raise explain(error, path) from error
        if not count:
            what = f"{shown(path)} ended early: found {offset} bytes, expected {offset + len(rest)}"
            raise BadDataError(what, FETCH_AGAIN)
        rest = rest[count:]
        offset += count


def read_small(path: Path) -> bytes:
    """A whole file that is known to be small (a configuration, an index)."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_JSON_BYTES:
            raise BadDataError(f"{shown(path)} has {size} bytes (expected at most {MAX_JSON_BYTES})", FETCH_AGAIN)
        return read_at(descriptor, path, 0, size)


def json_object(raw: bytes, place: str, *, unique_keys: bool) -> dict[str, object]:
    """A JSON object, or an error that says in which file and why not."""

    def pairs(items: list[tuple[str, Any]]) -> Mapping[str, object]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {shown(twice)} is there twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs if unique_keys else None)
    except UnicodeDecodeError as error:
        raise BadDataError(f"{place} is not UTF-8 text", FETCH_AGAIN) from error
    except RecursionError as error:
        raise BadDataError(f"{place} is nested too deeply", FETCH_AGAIN) from error
    except ValueError as error:
        raise BadDataError(f"{place} is not valid JSON: {error}", FETCH_AGAIN) from error
    if not isinstance(value, dict):
        raise BadDataError(f"{place} holds a {type(value).__name__} (expected a JSON object)", FETCH_AGAIN)
    return value
