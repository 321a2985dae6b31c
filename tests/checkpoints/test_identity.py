"""Whether a model is still what it was: no byte changes unseen, and a copy is known again."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import MissingInputError
from tests.checkpoints.builders import sparse_model, tiny_tensors, write_model

LARGE = 24  # MiB: more than is read whole


def poke(file: Path, place: int, byte: bytes = b"\1") -> None:
    """Change one byte, and give the file its old time of modification back."""
    times = file.stat()
    time.sleep(0.02)  # a file system counts time in steps of some milliseconds
    with file.open("r+b") as handle:
        handle.seek(place)
        handle.write(byte)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_small_model_keeps_its_key_where_it_is_copied(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    opened = open_checkpoint(folder)
    first = opened.cache_key()
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert first == opened.cache_key() == open_checkpoint(tmp_path / "copy").cache_key()
    (folder / "notes.txt").write_text("of no account")
    assert opened.cache_key() == first
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    second = opened.cache_key()
    assert second != first, "it is taken from the files as they are now"
    write_model(folder, shards=2, tensors=tiny_tensors(seed=1))
    assert opened.cache_key() not in (first, second)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(MissingInputError):
        opened.cache_key()


@pytest.mark.parametrize("mebibytes", [1, LARGE])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_one_byte_anywhere_changes_the_key(tmp_path: Path, mebibytes: int, share: float) -> None:
    opened = open_checkpoint(sparse_model(tmp_path, mebibytes, 4))
    file = tmp_path / "model.safetensors"
    first = opened.cache_key()
    poke(file, int(file.stat().st_size * share))
    assert opened.cache_key() != first


def test_other_weights_of_the_same_size_put_in_place(tmp_path: Path) -> None:
    """As a training run that writes its checkpoint again, or a copy that keeps times."""
    opened = open_checkpoint(sparse_model(tmp_path / "a", LARGE, 4))
    first = opened.cache_key()
    other = sparse_model(tmp_path / "b", LARGE, 4) / "model.safetensors"
    poke(other, LARGE << 19)
    shutil.copystat(tmp_path / "a" / "model.safetensors", other)
    time.sleep(0.02)
    other.replace(tmp_path / "a" / "model.safetensors")
    assert opened.cache_key() != first


def hub_cache(root: Path, content: Path) -> Path:
    """A snapshot that links to a blob named by its sha256, as `huggingface_hub` lays it out."""
    snapshot = root / "models--o--m" / "snapshots" / ("c" * 40)
    blobs = root / "models--o--m" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    shutil.copyfile(content / "config.json", snapshot / "config.json")
    shutil.copyfile(content / "model.safetensors", blobs / ("a" * 64))
    (snapshot / "model.safetensors").symlink_to(blobs / ("a" * 64))
    return snapshot


def test_a_model_that_the_hub_sends_again_keeps_its_key(tmp_path: Path) -> None:
    model = sparse_model(tmp_path / "model", LARGE, 4)
    first = open_checkpoint(hub_cache(tmp_path / "cache", model)).cache_key()
    time.sleep(0.02)
    assert open_checkpoint(hub_cache(tmp_path / "later", model)).cache_key() == first
    assert open_checkpoint(model).cache_key() != first


def test_a_fingerprint_is_of_the_weights_alone(tmp_path: Path) -> None:
    one = open_checkpoint(write_model(tmp_path / "one"))
    sharded = open_checkpoint(write_model(tmp_path / "sharded", shards=3, config={"model_type": "llama", "use": 1}))
    other = open_checkpoint(write_model(tmp_path / "other", tensors=tiny_tensors(seed=1)))
    narrow = open_checkpoint(write_model(tmp_path / "narrow", tensors=tiny_tensors(layers=1)))
    assert one.fingerprint() == sharded.fingerprint()
    assert len({one.fingerprint(), other.fingerprint(), narrow.fingerprint()}) == 3
    assert not sharded.is_other_than(one.fingerprint())
    assert other.is_other_than(one.fingerprint())
    assert not other.is_other_than(None)
    assert not other.is_other_than("0" * 64), "one of an earlier version says nothing"


def test_a_fingerprint_sees_one_matrix_among_many(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tensors=tiny_tensors(layers=40))
    before = open_checkpoint(folder).fingerprint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.17.mlp.up_proj.weight"].mul_(1.5)
    write_model(folder, tensors=tensors)
    assert open_checkpoint(folder).fingerprint() != before
