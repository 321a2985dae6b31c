"""A pass that was killed, damaged, finished, or asked for again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moe_svd_distill.adapter.adapter_file import sha256_of
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.streaming import PassSettings, ScaledAdapter, StreamedStates, stream, stream_states
from tests.streaming.conftest import LENGTH, Case

Ids = NDArray[np.int64]
SETTINGS = PassSettings(batch_tokens=2 * LENGTH)
RECORDED = replace(SETTINGS, record_at=1)
LAYERS = 3


class KilledError(Exception):
    """Stands for the end of a process."""


def run(case: Case, sequences: Ids, folder: Path, **options: Any) -> StreamedStates:
    return stream_states(case.checkpoint, sequences, folder, **{"settings": SETTINGS, **options})


def run_until(case: Case, sequences: Ids, folder: Path, layers: int, **options: Any) -> None:
    """A pass that ends when this many layers are done."""

    def stop(done: int, total: int) -> None:
        if done == layers:
            raise KilledError

    with pytest.raises(KilledError):
        run(case, sequences, folder, on_progress=stop, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name.partition(".")[2] for path in folder.iterdir())


def test_killed_and_resumed(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    """kill -9 after two of three layers; whoever comes next computes the third and no other, to the same bytes."""
    np.save(tmp_path / "ids.npy", sequences)
    words = [sparse.folder, sparse.adapter, tmp_path / "ids.npy", tmp_path / "killed", 2]
    command = [sys.executable, "-m", "tests.streaming.driver", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "done 2\n":
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert names(tmp_path / "killed") == ["layer-0002.safetensors"]
    resumed = run(sparse, sequences, tmp_path / "killed", adapter=ScaledAdapter(sparse.adapter))
    peaceful = run(sparse, sequences, tmp_path / "peaceful", adapter=ScaledAdapter(sparse.adapter))
    assert (resumed.record.layers_computed, resumed.record.layers_reused) == (1, 2)
    assert sha256_of(resumed.path) == sha256_of(peaceful.path)
    assert names(tmp_path / "killed") == ["safetensors"]


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_a_layer_goes_to_the_disk_when_it_is_time(
    sparse: Case, sequences: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(stream, "JOURNAL_SECONDS", seconds)
    run_until(sparse, sequences, tmp_path, LAYERS - 1)
    assert names(tmp_path) == ([] if seconds else [f"layer-{LAYERS - 1:04d}.safetensors"])


def test_without_a_journal_the_states_are_the_same(
    sparse: Case, sequences: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run(sparse, sequences, tmp_path / "kept")
    monkeypatch.setattr(stream, "JOURNAL_SECONDS", 600.0)
    assert sha256_of(run(sparse, sequences, tmp_path / "not kept").path) == sha256_of(kept.path)


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("done", range(LAYERS + 1))
def test_resumed_anywhere(sparse: Case, sequences: Ids, tmp_path: Path, done: int, spilled: bool) -> None:
    settings = replace(SETTINGS, activation_bytes=0 if spilled else None)
    whole = run(sparse, sequences, tmp_path / "whole")
    run_until(sparse, sequences, tmp_path / "cut", done, settings=settings)
    resumed = run(sparse, sequences, tmp_path / "cut", settings=settings)
    assert (resumed.record.layers_computed, resumed.record.layers_reused) == (LAYERS - done, done)
    assert sha256_of(resumed.path) == sha256_of(whole.path)
    if done == LAYERS:
        assert resumed.record.bytes_read == 0
        return
    left_out = {f"model.layers.{index}." for index in range(done)}
    skipped = [info.bytes for name, info in sparse.checkpoint.items() if name.startswith(tuple(left_out))]
    assert resumed.record.bytes_read == resumed.record.bytes_needed - sum(skipped)


def test_killed_in_the_middle_of_a_layer(
    sparse: Case, sequences: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dying writer leaves behind does not count, and goes away."""
    whole = run(sparse, sequences, tmp_path / "whole")
    run_until(sparse, sequences, tmp_path / "cut", 1)
    torn = tmp_path / "cut" / f".tmp~{os.uname().nodename}~999999999~0"
    torn.write_bytes(b"half a layer")
    resumed = run(sparse, sequences, tmp_path / "cut")
    assert resumed.record.layers_reused == 1
    assert sha256_of(resumed.path) == sha256_of(whole.path)
    assert names(tmp_path / "cut") == ["safetensors"]


def test_a_finished_pass_is_found(
    sparse: Case, sequences: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(sparse, sequences, tmp_path)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("nothing needs to be read"))
    again = run(sparse, sequences, tmp_path)
    assert again.path == first.path
    assert (again.record.layers_computed, again.record.layers_reused) == (0, LAYERS)
    assert torch.equal(again.rows(slice(None)), first.rows(slice(None)))


@pytest.mark.parametrize(
    "change",
    [
        lambda case, ids: {"sequences": ids[:, ::-1].copy()},
        lambda case, ids: {"adapter": ScaledAdapter(case.adapter)},
        lambda case, ids: {"adapter": ScaledAdapter(case.adapter, 0.5)},
        lambda case, ids: {"settings": replace(SETTINGS, dtype=torch.float64)},
        lambda case, ids: {"settings": replace(SETTINGS, batch_tokens=LENGTH)},
    ],
    ids=["tokens", "adapter", "scale", "dtype", "batch"],
)
def test_whatever_matters_is_part_of_the_key(
    sparse: Case, sequences: Ids, tmp_path: Path, change: Callable[[Case, Ids], dict[str, Any]]
) -> None:
    base = {"sequences": sequences, "settings": SETTINGS}
    first = stream_states(sparse.checkpoint, folder=tmp_path, **base)
    other = stream_states(sparse.checkpoint, folder=tmp_path, **{**base, **change(sparse, sequences)})
    assert other.record.layers_computed == LAYERS
    assert other.path != first.path


def damage(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("position", [-1, -40, -1000, 30], ids=["digest", "last state", "a state", "header"])
def test_a_damaged_final_file_is_moved_aside(sparse: Case, sequences: Ids, tmp_path: Path, position: int) -> None:
    first = run(sparse, sequences, tmp_path)
    digest = sha256_of(first.path)
    damage(first.path, position)
    again = run(sparse, sequences, tmp_path)
    assert again.record.rejected == (f"{first.path.name}.rejected-1",)
    assert again.record.layers_computed == LAYERS
    assert (tmp_path / again.record.rejected[0]).exists()
    assert sha256_of(again.path) == digest


def test_a_damaged_layer_file_is_moved_aside(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    whole = run(sparse, sequences, tmp_path / "whole")
    run_until(sparse, sequences, tmp_path / "cut", 2)
    (path,) = (tmp_path / "cut").glob("*.layer-0002.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    resumed = run(sparse, sequences, tmp_path / "cut")
    assert resumed.record.rejected == (f"{path.name}.rejected-1",)
    assert resumed.record.layers_computed == LAYERS
    assert sha256_of(resumed.path) == sha256_of(whole.path)


def test_states_that_are_not_kept(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    with run(sparse, sequences, tmp_path, settings=replace(SETTINGS, keep=False)) as result:
        states = result.rows(slice(0, 2))
        values = states.clone()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(states, values)


def test_what_a_layer_is_given_is_kept_if_asked_for(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    plain = run(sparse, sequences, tmp_path)
    digest = sha256_of(plain.path)
    assert plain.inputs is None
    first = run(sparse, sequences, tmp_path, settings=RECORDED)  # of the plain pass nothing is left to begin with
    assert first.record.layers_computed == LAYERS
    assert names(tmp_path) == ["layer-0001.safetensors", "safetensors"]
    again = run(sparse, sequences, tmp_path, settings=RECORDED)
    assert again.record.layers_reused == LAYERS
    assert again.inputs is not None
    assert first.inputs is not None
    assert torch.equal(again.inputs.rows(slice(1, 4))[0], first.inputs.rows(slice(None))[0][1:4])
    damage(tmp_path / f"states-{first.record.key}.layer-0001.safetensors", -40)
    mended = run(sparse, sequences, tmp_path, settings=RECORDED)
    assert (mended.record.layers_computed, len(mended.record.rejected)) == (LAYERS, 1)
    assert sha256_of(mended.path) == digest


def test_a_killed_pass_keeps_what_a_layer_is_given(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    run_until(sparse, sequences, tmp_path, 2, settings=RECORDED)
    assert names(tmp_path) == ["layer-0001.safetensors", "layer-0002.safetensors"]
    resumed = run(sparse, sequences, tmp_path, settings=RECORDED)
    assert (resumed.record.layers_computed, resumed.record.layers_reused) == (1, 2)
    assert names(tmp_path) == ["layer-0001.safetensors", "safetensors"]
