"""Fetching and keeping the tensors of a remote model."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest

from moe_svd_distill.checkpoints.remote import tensors as module
from moe_svd_distill.checkpoints.remote.tensors import FetchedTensors
from moe_svd_distill.errors import CannotWriteError, RemoteError, UsageError
from moe_svd_distill.files.header import TensorInfo

CONTENT = os.urandom(1 << 20)
NAME = "model-00001-of-00001.safetensors"


class Far:
    """A remote file that counts what is asked of it, and fails after so many bytes."""

    def __init__(self, most: int | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self._most, self._lock = most, Lock()

    def __call__(self, name: str, begin: int, end: int) -> tuple[bytes, int]:
        with self._lock:
            self.asked.append((begin, end))
            if self._most is not None and sum(last - first for first, last in self.asked) > self._most:
                raise RemoteError("the connection ended", "Try again later")
        return CONTENT[begin:end], len(CONTENT)

    @property
    def bytes(self) -> int:
        return sum(end - begin for begin, end in self.asked)


def _info(begin: int, count: int) -> TensorInfo:
    return TensorInfo(f"t{begin}", (count,), "U8", count, Path(NAME), begin)


def _content(tensors: FetchedTensors, info: TensorInfo) -> bytes:
    descriptor, _ = tensors.open(NAME, info)
    try:
        return os.read(descriptor, info.bytes + 1)
    finally:
        os.close(descriptor)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("count", [1, 100, 1000, 1001, 5000])
def test_a_tensor_is_fetched_once_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    far = Far()
    for _ in range(2):
        assert _content(FetchedTensors(tmp_path, far), _info(17, count)) == CONTENT[17 : 17 + count]
    assert far.bytes == count
    assert max(end - begin for begin, end in far.asked) <= 100
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"17-{count}"]


def test_what_was_fetched_before_a_failure_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    monkeypatch.setattr(module, "_AHEAD", 1)
    with pytest.raises(RemoteError, match="connection ended"):
        _content(FetchedTensors(tmp_path, Far(most=600)), _info(17, 1000))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["17-1000.part"]
    far = Far()
    assert _content(FetchedTensors(tmp_path, far), _info(17, 1000)) == CONTENT[17:1017]
    assert far.bytes == 400


def test_several_threads_fetch_a_tensor_once(tmp_path: Path) -> None:
    far = Far()
    tensors = [FetchedTensors(tmp_path, far) for _ in range(2)]
    infos = [_info(1000 * n, 1000) for n in range(20)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: _content(tensors[n % 2], infos[n % 20]), range(80)))
    assert all(found[n] == CONTENT[1000 * (n % 20) :][:1000] for n in range(80))
    assert far.bytes == 20 * 1000


def test_fetching_ahead(tmp_path: Path) -> None:
    far = Far()
    tensors = FetchedTensors(tmp_path, far)
    tensors.fetch((NAME, _info(1000 * n, 1000)) for n in range(20))
    assert far.bytes == 20_000
    assert _content(tensors, _info(7000, 1000)) == CONTENT[7000:8000]
    assert far.bytes == 20_000


@pytest.mark.parametrize("room", [1000, 3500, 10_000, 64_000])
def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, room: int) -> None:
    far = Far()
    tensors = FetchedTensors(tmp_path, far, room)
    for _ in range(2):
        for n in range(100):
            assert _content(tensors, _info(1000 * n, 1000)) == CONTENT[1000 * n : 1000 * n + 1000]
            assert _size(tmp_path) <= room
    again = far.bytes
    assert _content(tensors, _info(99_000, 1000)) == CONTENT[99_000:100_000]
    assert far.bytes == again, "the last one used is there"
    tensors.fetch((NAME, _info(500_000 + 1000 * n, 1000)) for n in range(100))
    assert _size(tmp_path) <= room
    with pytest.raises(UsageError, match=f"takes {room + 1:,} bytes, and {room:,} may be kept"):
        _content(tensors, _info(0, room + 1))


def test_parts_of_killed_runs_count_and_make_room(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    for n in range(8):
        (folder / f"{500_000 + 1000 * n}-1000.part").write_bytes(bytes(900))
    held = folder / "700000-1000.part"
    held.write_bytes(bytes(900))
    with held.open("r+b") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)  # as another process does while it fetches
        for path in folder.iterdir():
            os.utime(path, (0, 0))
        tensors = FetchedTensors(tmp_path, Far(), 8000)
        for n in range(20):
            assert _content(tensors, _info(1000 * n, 1000)) == CONTENT[1000 * n : 1000 * n + 1000]
            assert _size(tmp_path) <= 8000
        assert list(folder.glob("*.part")) == [held]


def test_a_part_that_goes_while_it_is_waited_for(tmp_path: Path) -> None:
    """Whoever opened it before it was removed begins another one."""
    part = tmp_path / NAME / "17-1000.part"
    part.parent.mkdir()
    part.write_bytes(bytes(500))
    waiting = part.open("r+b")
    fcntl.flock(waiting, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(_content, FetchedTensors(tmp_path, Far()), _info(17, 1000))
        while not fetched.running():
            pass
        part.unlink()
        waiting.close()
        assert fetched.result() == CONTENT[17:1017]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CannotWriteError, match=r"Cannot write .*0-1000: the disk is full\. .*remote_cache_gb"):
        _content(FetchedTensors(tmp_path, Far()), _info(0, 1000))


def test_a_tensor_that_is_let_go_of_while_it_is_read_stays_readable(tmp_path: Path) -> None:
    tensors = FetchedTensors(tmp_path, Far(), 1000)
    descriptor, path = tensors.open(NAME, _info(0, 1000))
    assert _content(tensors, _info(1000, 1000)) == CONTENT[1000:2000]
    assert not path.exists()
    assert os.read(descriptor, 1000) == CONTENT[:1000]
    os.close(descriptor)


def _read_all(folder: Path, room: int, seed: int) -> int:
    import random

    far, chance = Far(), random.Random(seed)
    tensors = FetchedTensors(folder, far, room)
    for _ in range(150):
        n = chance.randrange(30)
        assert _content(tensors, _info(1000 * n, 1000)) == CONTENT_OF_ALL[1000 * n :][:1000]
    return far.bytes


CONTENT_OF_ALL = CONTENT


def test_processes_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        enough = pool.starmap(_read_all, [(tmp_path / "enough", 10**6, seed) for seed in range(4)])
        little = pool.starmap(_read_all, [(tmp_path / "little", 8000, seed) for seed in range(4)])
    assert sum(enough) == 30_000
    assert sum(little) > 30_000


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError):
        _content(FetchedTensors(tmp_path / "file", Far()), _info(0, 10))
