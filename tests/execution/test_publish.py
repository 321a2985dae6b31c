"""A folder belongs to one run, and what is published in it is complete."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_svd_distill.errors import CannotWriteError
from moe_svd_distill.execution.publish import OutputFolder
from moe_svd_distill.files.writing import write_text


def publish(path: Path, content: str) -> None:
    with OutputFolder(path) as folder:
        for name in ("run.json", "adapter_config.json", "adapter_model.safetensors", "README.md"):
            write_text(folder.staged(name), content)
        folder.publish()


def test_publishing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert not OutputFolder(out).published
    for content in ("first", "second"):
        publish(out, content)
        assert OutputFolder(out).published
        assert (out / "adapter_model.safetensors").read_text() == content
    names = sorted(path.name for path in out.iterdir())
    assert names == [".lock", "README.md", "adapter_config.json", "adapter_model.safetensors", "parts", "run.json"]


def test_the_record_that_a_killed_run_withdrew_goes_when_the_next_one_ends_well(tmp_path: Path) -> None:
    publish(tmp_path, "old")
    (tmp_path / "run.json").rename(tmp_path / ".withdrawn-run.json")
    assert OutputFolder(tmp_path).cleanable() == [tmp_path / ".withdrawn-run.json"]
    publish(tmp_path, "new")
    assert OutputFolder(tmp_path).cleanable() == []


def test_the_manifest_leaves_first_and_arrives_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, "old")
    moves: list[tuple[str, str]] = []
    replace = os.replace

    def recorded(source: Path, target: Path) -> None:
        if not source.name.startswith(".tmp~"):
            moves.append((source.name, target.name))
        replace(source, target)

    monkeypatch.setattr(Path, "replace", recorded)
    publish(tmp_path, "new")
    assert moves == [
        ("run.json", ".withdrawn-run.json"),
        ("README.md", "README.md"),
        ("adapter_model.safetensors", "adapter_model.safetensors"),
        ("adapter_config.json", "adapter_config.json"),
        ("run.json", "run.json"),
    ]


def test_what_an_earlier_run_staged_is_not_published(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as folder:
        write_text(folder.staged("old.txt"), "")
    publish(tmp_path, "new")
    assert not (tmp_path / "old.txt").exists()


def test_nothing_is_published_without_a_manifest(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as folder:
        write_text(folder.staged("README.md"), "")
        with pytest.raises(ValueError, match=r"run\.json has not been staged"):
            folder.publish()
    assert not (tmp_path / "README.md").exists()


def test_names_that_leave_the_folder(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as folder, pytest.raises(ValueError, match="not the name of a file"):
        folder.staged("../escape")


def test_a_folder_in_use(tmp_path: Path) -> None:
    holder = "import sys; from pathlib import Path; from moe_svd_distill.execution.publish import OutputFolder\n"
    holder += "with OutputFolder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        (tmp_path / "parts" / "part-00.safetensors").touch()
        for use in (lambda: OutputFolder(tmp_path).__enter__(), OutputFolder(tmp_path).clean):
            with pytest.raises(CannotWriteError, match="in use by another run") as caught:
                use()
            assert caught.value.exit_code == 73
            assert "\n" not in str(caught.value)
        process.kill()
    with OutputFolder(tmp_path):
        pass


def test_a_folder_in_use_by_this_process(tmp_path: Path) -> None:
    with OutputFolder(tmp_path), pytest.raises(CannotWriteError, match="in use"), OutputFolder(tmp_path):
        pass


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors", "adapter_config.json"])
def test_files_of_others_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(CannotWriteError, match=f"holds a {name} that this program did not write"):
        publish(tmp_path, "new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_adapter_that_was_copied_here_can_be_made_again(tmp_path: Path) -> None:
    publish(tmp_path, "old")
    (tmp_path / ".lock").unlink()
    publish(tmp_path, "new")


def test_cleaning_leaves_the_adapter_and_files_of_others(tmp_path: Path) -> None:
    publish(tmp_path, "new")
    working = [
        tmp_path / "parts" / "part-00.safetensors",
        tmp_path / "parts" / "part-00.safetensors.rejected-1",
        tmp_path / "parts" / ".tmp~host~1~ff",
        tmp_path / ".tmp~host~1~ff",
    ]
    for path in (*working, tmp_path / "parts" / "notes.txt"):
        path.touch()
    folder = OutputFolder(tmp_path)
    assert sorted(folder.cleanable()) == sorted(working)
    assert sorted(folder.clean()) == sorted(working)
    assert folder.clean() == []
    assert folder.published
    assert (tmp_path / "parts" / "notes.txt").exists()
    (tmp_path / "parts" / "notes.txt").unlink()
    working[0].touch()
    with folder:
        folder.clean()
    assert not (tmp_path / "parts").exists()


def test_cleaning_takes_states_of_this_folder_only(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    publish(out, "new")
    cache = out / "cache"
    cache.mkdir()
    working = [
        out / "parts" / "part-0f-pass-3.safetensors",
        cache / "states-0f.safetensors",
        cache / "states-0f.layer-0003.safetensors",
        cache / "states-0f.safetensors.rejected-1",
        cache / ".tmp~host~1~ff",
    ]
    for path in (*working, cache / "notes.txt"):
        path.touch()
    assert sorted(OutputFolder(out).cleanable()) == sorted(working)
    assert sorted(OutputFolder(out).clean()) == sorted(working)
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]
    (cache / "notes.txt").unlink()
    (cache / "states-1f.safetensors").touch()
    OutputFolder(out).clean()
    assert not cache.exists()

    elsewhere.mkdir()
    (elsewhere / "states-2f.safetensors").touch()
    cache.symlink_to(elsewhere)
    assert OutputFolder(out).clean() == []
    (out / "parts").mkdir(exist_ok=True)
    (out / "parts" / "part-00.safetensors").touch()
    assert len(OutputFolder(out).clean()) == 1
    assert [path.name for path in elsewhere.iterdir()] == ["states-2f.safetensors"]
    assert cache.is_symlink()


def test_cleaning_where_nothing_is(tmp_path: Path) -> None:
    assert OutputFolder(tmp_path / "none").clean() == []
    assert OutputFolder(tmp_path).clean() == []
    assert not list(tmp_path.iterdir())
