"""Files are whole or absent, on full disks as well."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from moe_svd_distill.errors import CannotWriteError
from moe_svd_distill.execution.parts import PartContent, verify_part, write_part
from moe_svd_distill.files.writing import (
    durable_file,
    explain_writing,
    make_folder,
    new_folder,
    remove_stale_temporaries,
    write_json,
)

KEY = "ab" * 32


def big_part() -> PartContent:
    return {"a": torch.arange(150_000, dtype=torch.float32)}, {}


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), durable_file(path) as sink:
        sink.write([b"new"])  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    with durable_file(tmp_path / "file") as sink:
        sink.write(b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_file_size_limit(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CannotWriteError, match="ulimit -f") as caught:
            write_part(tmp_path, KEY, *big_part())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 73
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    except OSError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_at_every_fill_level(small_disk: Path) -> None:
    """The part takes 147 blocks of a disk of 256; whatever is left, it is written whole or cleanly refused."""
    refused = 0
    for filled in range(0, 257, 12):
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(filled * 4096))
        if filled + 147 <= 256:
            path = write_part(small_disk, KEY, *big_part())
            assert verify_part(path, KEY)
            path.unlink()
        else:
            with pytest.raises(CannotWriteError, match="the disk is full"):
                write_part(small_disk, KEY, *big_part())
            assert list(small_disk.iterdir()) == [ballast]
            refused += 1
        ballast.unlink()
    assert 10 <= refused <= 14
    assert verify_part(write_part(small_disk, KEY, *big_part()), KEY)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_failures_that_last_are_explained(number: int) -> None:
    explained = explain_writing(OSError(number, os.strerror(number)), Path("out"))
    assert explained is not None
    assert explained.exit_code == 73


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), OSError(errno.EACCES, "denied"), ValueError("x")])
def test_other_failures_are_not(error: Exception) -> None:
    assert explain_writing(error, Path("out")) is None


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(CannotWriteError, match="No such file"), durable_file(tmp_path / "gone" / "file"):
        pass


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWriteError, match="Not a directory"):
        make_folder(tmp_path / "file" / "folder")


def test_only_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    host = socket.gethostname()
    stale = [tmp_path / f".tmp~{host}~{pid}~00ff" for pid in (gone.pid, zombie.pid)]
    others = [
        tmp_path / f".tmp~{host}~{os.getpid()}~00ff",
        tmp_path / f".tmp~elsewhere~{gone.pid}~00ff",
        tmp_path / ".tmp~mine",
        tmp_path / "part-00.safetensors",
    ]
    for path in (*stale, *others):
        path.touch()
    assert remove_stale_temporaries(tmp_path) == 2
    zombie.wait()
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_json(tmp_path: Path) -> None:
    value = {"nan": float("nan"), "list": [1.5, (float("inf"), "ü")], "none": None}
    write_json(tmp_path / "file.json", value)
    text = (tmp_path / "file.json").read_text()
    assert json.loads(text) == {"nan": None, "list": [1.5, [None, "ü"]], "none": None}
    assert "ü" in text
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == 0o644


def test_a_folder_appears_at_the_end_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with new_folder(path) as folder:
        (folder / "a").write_text("x")
        assert not path.exists()
        assert folder.parent == path.parent
    assert (path / "a").read_text() == "x"
    assert path.stat().st_mode & 0o777 == 0o755
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with suppress(RuntimeError, KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_refusal_of_the_system_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotWriteError, match=r"annot (write|be written)"), new_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(CannotWriteError, match="not an empty folder"), new_folder(tmp_path / "file"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_name_that_is_no_text_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    name = os.fsdecode(b"/data/caf\xe9")
    write_json(tmp_path / "run.json", {"path": name, "é": "模"})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"path": name, "é": "模"}
