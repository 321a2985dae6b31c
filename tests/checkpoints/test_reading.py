"""Reading tensors: the right bytes, no memory of their own, and a clean error when the file changes underneath."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint, tensors
from moe_svd_distill.checkpoints.storage import Storage
from moe_svd_distill.errors import BadDataError, MissingInputError
from moe_svd_distill.files.dtypes import TORCH_NAMES
from moe_svd_distill.files.header import read_header
from tests.checkpoints.builders import entry, safetensors_bytes, sparse_model, tiny_tensors, write_model

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(write_model(tmp_path, shards=2)) as opened:
        yield opened


def test_every_tensor_is_what_was_saved(checkpoint: Checkpoint) -> None:
    for name, tensor in tiny_tensors().items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert checkpoint[name].shape == tuple(tensor.shape)


@pytest.mark.parametrize("dtype", sorted(TORCH_NAMES.values()))
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    raw = torch.randint(0, 2, (4, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    saved = {"a": raw.view(getattr(torch, dtype)), "scalar": raw.view(getattr(torch, dtype))[0, 0].clone()}
    write_model(tmp_path, tensors=saved)
    header = read_header(tmp_path / "model.safetensors")
    for name, tensor in load_file(header.file).items():
        read = Storage(tmp_path).view(header.tensors[name], {"model.safetensors": header})
        assert read.dtype == tensor.dtype == saved[name].dtype
        assert read.shape == tensor.shape
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_tensor_without_elements_and_unaligned_tensor(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    header = {"mask": entry("BOOL", [1], 0, 1), "empty": entry("F32", [0, 3], 1, 1), "odd": entry("F32", [2], 1, 9)}
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, b"\1" + values.numpy().tobytes()))
    opened = open_checkpoint(tmp_path)
    assert opened.read("empty").shape == (0, 3)
    assert torch.equal(opened.read("odd"), values)
    assert opened.read("odd").data_ptr() % 4 == 0


def test_missing_name(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadDataError, match="has no tensor 'nothing'"):
        checkpoint.read("nothing")
    with pytest.raises(KeyError):
        checkpoint["nothing"]
    assert "nothing" not in checkpoint
    assert checkpoint.get("nothing") is None


def test_other_device(checkpoint: Checkpoint) -> None:
    read = checkpoint.read(NAME, device="meta")
    assert read.is_meta
    assert read.shape == (16, 8)
    assert checkpoint.read(NAME, device=torch.device("cpu")).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu(checkpoint: Checkpoint) -> None:
    read = checkpoint.read(NAME, device="cuda:0")
    assert read.device == torch.device("cuda:0")
    assert torch.equal(read.cpu(), tiny_tensors()[NAME])


def test_change_in_place_stays_in_that_one_tensor(checkpoint: Checkpoint) -> None:
    before = checkpoint[NAME].file.read_bytes()
    first, second = checkpoint.read(NAME), checkpoint.read(NAME)
    first += 1
    assert torch.equal(second, tiny_tensors()[NAME])
    assert torch.equal(checkpoint.read(NAME), tiny_tensors()[NAME])
    assert checkpoint[NAME].file.read_bytes() == before


def resident() -> dict[str, int]:
    """The process's resident memory in MiB, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith("Rss")}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_reading_300_mib_takes_no_anonymous_memory(tmp_path: Path) -> None:
    opened = open_checkpoint(sparse_model(tmp_path, 300, 10))
    opened.read("t0").view(torch.int16).max()
    gc.collect()
    before = resident()
    kept = {name: opened.read(name) for name in opened}
    for tensor in kept.values():
        assert tensor.view(torch.int16).max() == 0
    during = resident()
    assert during["RssAnon"] - before["RssAnon"] < 16
    assert during["RssFile"] - before["RssFile"] > 250
    del kept, tensor
    gc.collect()
    assert resident()["RssFile"] - before["RssFile"] < 32, "a tensor that is gone gives its mapping back"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_four_thousand_tensors_take_one_descriptor(tmp_path: Path) -> None:
    opened = open_checkpoint(sparse_model(tmp_path, 16, 4096))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    alive = tensors._live
    kept = [opened.read(name) for name in opened]
    assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208
    assert tensors._live == alive + 4096
    del kept
    gc.collect()
    assert tensors._live == alive
    opened.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("reason", ["too many", "refused"])
def test_bytes_are_copied_where_they_cannot_be_mapped(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENODEV, "no mappings here")

    if reason == "too many":
        monkeypatch.setattr(tensors, "MAX_MAPPINGS", tensors._live)
    else:
        monkeypatch.setattr(tensors, "map_bytes", refuse)
    alive = tensors._live
    assert torch.equal(checkpoint.read(NAME), tiny_tensors()[NAME])
    assert tensors._live == alive


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    with open_checkpoint(write_model(tmp_path)) as opened:
        read = opened.read(NAME)
    assert torch.equal(read, tiny_tensors()[NAME])
    assert torch.equal(opened.read(NAME), read), "a closed checkpoint opens its files again"
    opened.close()
    del opened
    gc.collect()
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(read, tiny_tensors()[NAME])


def test_threads(checkpoint: Checkpoint) -> None:
    expected = tiny_tensors()
    barrier = threading.Barrier(8)

    def work(seed: int) -> bool:
        barrier.wait()
        names = list(expected)[seed % 3 :] * 20
        return all(torch.equal(checkpoint.read(name), expected[name]) for name in names)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_file_cut_off_before_the_first_read(checkpoint: Checkpoint) -> None:
    file = checkpoint[NAME].file
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(BadDataError, match="not the file that was checked"):
        checkpoint.read(NAME)


def test_file_cut_off_between_two_reads(checkpoint: Checkpoint) -> None:
    checkpoint.read(NAME)
    os.truncate(checkpoint[NAME].file, checkpoint[NAME].offset + 3)
    with pytest.raises(BadDataError, match="was cut off"):
        checkpoint.read(NAME)


def test_file_replaced_before_the_first_read(checkpoint: Checkpoint) -> None:
    file = checkpoint[NAME].file
    size = file.stat().st_size
    save_file({name + "x": tensor for name, tensor in load_file(file).items()}, file)
    os.truncate(file, size)
    with pytest.raises(BadDataError, match=file.name):
        checkpoint.read(NAME)


def test_file_removed_before_the_first_read(checkpoint: Checkpoint) -> None:
    checkpoint[NAME].file.unlink()
    with pytest.raises(MissingInputError, match="not there"):
        checkpoint.read(NAME)


def _read_elsewhere(opened: Checkpoint) -> tuple[list[float], str]:
    return opened.read(NAME).flatten().tolist(), opened.fingerprint()


def test_another_process(checkpoint: Checkpoint) -> None:
    checkpoint.read(NAME)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        values, fingerprint = pool.apply(_read_elsewhere, (checkpoint,))
    assert values == tiny_tensors()[NAME].flatten().tolist()
    assert fingerprint == checkpoint.fingerprint()


def test_pickle_opens_lazily_and_refuses_other_files(checkpoint: Checkpoint) -> None:
    small = pickle.dumps(checkpoint)
    assert len(small) < 2000
    copy = pickle.loads(small)  # noqa: S301
    assert copy._survey is None
    assert copy.source == checkpoint.source
    assert dict(copy) == dict(checkpoint)
    assert torch.equal(copy.read(NAME), checkpoint.read(NAME))
    write_model(checkpoint.folder, shards=2, tensors=tiny_tensors(layers=3))
    with pytest.raises(BadDataError, match="not the file that was checked"):
        len(pickle.loads(small))  # noqa: S301


def test_a_broken_checkpoint_says_so_at_every_use(tmp_path: Path) -> None:
    broken = Checkpoint(tmp_path)
    for use in (
        lambda: len(broken),
        lambda: broken.config,
        lambda: broken.read(NAME),
        broken.fingerprint,
        broken.cache_key,
    ):
        with pytest.raises(MissingInputError):
            use()
    broken.close()
