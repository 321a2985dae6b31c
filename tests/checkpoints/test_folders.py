"""Folders: which files make up the model, and everything that can be wrong between them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import MissingInputError
from tests.checkpoints.builders import (
    entry,
    read_index,
    safetensors_bytes,
    shard_name,
    tiny_tensors,
    write_index,
    write_model,
)
from tests.support.refusals import refusal

FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)


@pytest.mark.parametrize(("shards", "index"), [(1, False), (3, True), (3, False)])
def test_the_three_layouts_hold_the_same_tensors(tmp_path: Path, shards: int, index: bool) -> None:
    tensors = tiny_tensors()
    with open_checkpoint(write_model(tmp_path, tensors=tensors, shards=shards, index=index)) as checkpoint:
        assert set(checkpoint) == set(tensors)
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert checkpoint.config["model_type"] == "llama"
        assert not checkpoint.look_again().faults
        assert {info.file.parent for info in checkpoint.values()} == {tmp_path}


@pytest.mark.parametrize(
    "names",
    [
        ["model-1-of-2.safetensors", "model-2-of-2.safetensors"],
        ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"],
        ["model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"],
    ],
)
def test_other_ways_to_number_shards(tmp_path: Path, names: list[str]) -> None:
    write_model(tmp_path, shards=2, index=False)
    for old, new in zip((FIRST, SECOND), names, strict=True):
        (tmp_path / old).rename(tmp_path / f"{new}.new")
    for new in names:
        (tmp_path / f"{new}.new").rename(tmp_path / new)
    assert len(open_checkpoint(tmp_path)) == len(tiny_tensors())


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not looked at")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    (tmp_path / "training_args.bin").write_bytes(b"not looked at")
    assert len(open_checkpoint(tmp_path)) == len(tiny_tensors())


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    write_model(tmp_path, shards=3)
    (tmp_path / "config.json").unlink()
    (tmp_path / shard_name(1, 3)).write_bytes(b"junk")
    (tmp_path / shard_name(2, 3)).unlink()
    error = refusal(tmp_path, MissingInputError)
    assert error.what.startswith("3 faults: ")
    for word in ("config.json", shard_name(1, 3), shard_name(2, 3)):
        assert word in error.what
    assert len(error.faults) == 3  # type: ignore[attr-defined]


def test_a_thousand_faults_stay_readable(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    write_index(tmp_path, read_index(tmp_path) | {f"model.none.{number}": FIRST for number in range(1000)})
    error = refusal(tmp_path)
    assert len(error.what) < 2500
    assert "and 992 more" in error.what
    assert len(error.faults) == 1000  # type: ignore[attr-defined]


def test_truncated_file(tmp_path: Path) -> None:
    write_model(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    os.truncate(tmp_path / "model.safetensors", size - 1)
    assert f"found {size - 1} bytes, expected {size}" in refusal(tmp_path).what


def test_file_without_tensors(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({}))
    assert "holds no tensor at all" in refusal(tmp_path).what


def test_links(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "outside the model's folder" in refusal(folder).what
    (folder / "model.safetensors").unlink()
    (tmp_path / "elsewhere.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert len(open_checkpoint(folder)) == len(tiny_tensors())
    (tmp_path / "other name").symlink_to(folder)
    assert len(open_checkpoint(tmp_path / "other name")) == len(tiny_tensors())
    (folder / "weights").unlink()
    assert "not there" in refusal(folder, MissingInputError).what
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    assert "model.safetensors" in refusal(folder).what


def test_links_to_the_blobs_of_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = write_model(tmp_path / "models--org--name" / "snapshots" / ("a" * 40))
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).rename(blobs / f"blob of {name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"blob of {name}")
    checkpoint = open_checkpoint(snapshot)
    assert len(checkpoint) == len(tiny_tensors())
    assert checkpoint.commit == "a" * 40
    foreign = write_model(tmp_path / "models--org--secret" / "blobs")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(foreign / "model.safetensors")
    assert "outside the model's folder" in refusal(snapshot).what


def test_things_that_are_not_files(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refusal(tmp_path).what
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refusal(tmp_path).what


@pytest.mark.parametrize("config", ["", "[]", "{", "\xff", '"text"', "[" * 100_000])
def test_broken_configuration(tmp_path: Path, config: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    assert "config.json" in refusal(tmp_path).what


def test_code_in_the_configuration_is_not_run(tmp_path: Path) -> None:
    write_model(tmp_path, config={"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}})
    (tmp_path / "evil.py").write_text("raise SystemExit(1)")
    assert open_checkpoint(tmp_path).config["auto_map"] == {"AutoConfig": "evil.Config"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    error = refusal(tmp_path)
    assert name in error.what
    assert "Convert the model to safetensors" in error.action


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.gguf", "weights.safetensors"])
def test_other_weights_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"")
    error = refusal(tmp_path, MissingInputError)
    assert name in error.what
    assert ("adapter" in name) == ("adapter" in error.action)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model-Q4_K.gguf"], "folder of GGUF files ('model-Q4_K.gguf')"),
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "mmproj.gguf"], "'a-00001-of-00002.gguf' and 2 more"),
        (["MODEL.GGUF", "README.md", "pytorch_model.bin"], "'MODEL.GGUF')"),
        (["a.gguf", "config.json"], "'a.gguf')"),
    ],
)
def test_a_folder_of_gguf_files(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    error = refusal(tmp_path, MissingInputError)
    assert words in error.what
    assert "config.json" not in error.what
    assert "Give the file itself" in error.action


def test_a_gguf_file_beside_other_weights_is_not_meant(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "config.json" in refusal(tmp_path, MissingInputError).what


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    write_model(tmp_path)
    header = {"\x1b]0;owned\x07" + "long" * 1000: entry("F32", [2], 0, 8)}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(8)))
    error = refusal(tmp_path)
    assert "\\x1b]0;owned\\x07long" in error.what
    assert len(error.what) < 500


@pytest.mark.parametrize(
    "model",
    [
        "",
        "nothing",
        "a/b/c",
        "./missing/",
        "/missing",
        "~nobody-of-that-name/x",
        "a\0b",
        "x" * 5000,
        "org/name@",
        "org/na me",
    ],
)
def test_what_the_user_typed_is_nothing(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInputError):
        open_checkpoint(model)


def test_a_path_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInputError, match="is not there"):
        open_checkpoint(Path("org/name"))


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(MissingInputError, match="is a file"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_relative_folder_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("org/name")  # an existing folder wins over the hub
    monkeypatch.chdir("/")
    assert checkpoint.source == "org/name"
    assert checkpoint.read("model.norm.weight").shape == (8,)


def test_names_in_other_scripts(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "模型 été")
    assert len(open_checkpoint(folder)) == len(tiny_tensors())
    (folder / "config.json").unlink()
    assert "模型 été" in refusal(folder, MissingInputError).what


def test_total_size_of_the_index_is_not_believed(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 0
    open_checkpoint(tmp_path)
