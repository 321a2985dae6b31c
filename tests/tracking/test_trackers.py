"""Event files read back by TensorBoard itself; W&B as a stand-in, really offline, and out of reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.execution.events import Event, Measured, Noted
from moe_svd_distill.tracking import tracked
from tests.support.trackers import wandb_replaced

KEY = "feedfacefeedfacefeedfacefeedfacefeedface"
FIGURES = {"loss": 0.5, "kl": 0.25}


def _run(tracker: str, folder: Path, *steps: int) -> list[str]:
    """Points of a curve and two figures at the end; the notes."""
    told: list[Event] = []
    with tracked([tracker], folder, told.append, {"rank": 8}) as tell:
        for step in steps:
            tell(Measured("refined", FIGURES, step))
        tell(Measured("scale search of refined", {"kl": 0.125}))
    return [event.text for event in told if isinstance(event, Noted)]


def _curve(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place,) = (folder / "runs").iterdir()
    read = EventAccumulator(str(place)).Reload()
    assert {"refined/kl", "refined/loss", "scale_search_of_refined/kl"} <= set(read.Tags()["scalars"])
    assert [event.value for event in read.Scalars("scale_search_of_refined/kl")][-1] == 0.125
    assert {event.value for event in read.Scalars("refined/kl")} == {0.25}
    assert "recipe/text_summary" in read.Tags()["tensors"]
    return [event.step for event in read.Scalars("refined/kl")]


def test_tensorboard_reads_one_run_of_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert _run("tensorboard", tmp_path, 0, 10) == []
    assert _curve(tmp_path) == [0, 10]
    assert _run("tensorboard", tmp_path, 0, 10, 20) == []
    assert _curve(tmp_path) == [0, 10, 20]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in in place of wandb, and the file that it writes to."""
    with wandb_replaced(tmp_path, monkeypatch) as written:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield written


def _written(file: Path, what: str) -> list[dict[str, Any]]:
    return [each for each in map(json.loads, file.read_text().splitlines()) if each["what"] == what]


def test_wandb_gets_curves_over_steps_and_figures_as_a_summary(stand_in: Path, tmp_path: Path) -> None:
    assert _run("wandb", tmp_path, 0, 10) == []
    (begun,) = _written(stand_in, "init")
    assert (begun["resume"], begun["config"], begun["project"]) == ("allow", {"rank": 8}, "moe-svd-distill")
    assert begun["mode"] is None
    assert not begun["asks"]
    assert begun["settings"]["silent"]
    assert {"refined/step", None} == {each["step_metric"] for each in _written(stand_in, "metric")}
    logged = [each["figures"] for each in _written(stand_in, "log")]
    assert logged == [{"refined/loss": 0.5, "refined/kl": 0.25, "refined/step": step} for step in (0, 10)]
    assert {"scale_search_of_refined/kl": 0.125} in [each["figures"] for each in _written(stand_in, "summary")]
    assert [each["exit_code"] for each in _written(stand_in, "finish")] == [0]


def test_wandb_out_of_reach_is_said_once_and_its_files_are_kept(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_FAILS", "init")
    (note,) = _run("wandb", tmp_path, 0, 10)
    assert note.startswith("W&B is not reached (no way, says *** to ***)")
    assert note.endswith(f"wandb sync {tmp_path / 'wandb' / 'offline-run'}")
    assert [each["mode"] for each in _written(stand_in, "init")] == ["offline"]
    assert len(_written(stand_in, "log")) == 2


def test_wandb_that_fails_later_stops_nothing_and_shows_no_key(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_FAILS", "log")
    (note,) = _run("wandb", tmp_path, 0, 10, 20)
    assert note == "report_to: wandb failed and gets nothing any more (no way, says ***)"


SCRIPT = """
import sys
from pathlib import Path
from moe_svd_distill.execution.events import Measured, Noted
from moe_svd_distill.tracking import tracked

def tell(event):
    if isinstance(event, Noted):
        print(event.text)

with tracked(["wandb"], Path(sys.argv[1]), tell, {"rank": 8}) as tell:
    for step in (0, 10):
        tell(Measured("refined", {"kl": 0.25}, step))
    tell(Measured("scale search of refined", {"kl": 0.125}))
"""


def _with_wandb(folder: Path, **environment: str) -> tuple[str, str]:
    """In another process, because wandb has settings for the whole process: the notes and standard error."""
    pytest.importorskip("wandb")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    settings = clean | {"HOME": str(folder), "NETRC": str(folder / "none"), **environment}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert KEY not in done.stdout + done.stderr
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20  # wandb's own process is a moment behind the end of the run
    while b"scale_search_of_refined/kl" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    kept = file.read_bytes()
    assert all(name in kept for name in (b"refined/kl", b"refined/step", b"scale_search_of_refined/kl"))
    assert KEY.encode() not in kept
    return done.stdout, done.stderr


def test_wandb_itself_works_offline(tmp_path: Path) -> None:
    notes, said = _with_wandb(tmp_path, WANDB_MODE="offline", WANDB_API_KEY=KEY)
    assert (notes, said) == ("", "")


def test_wandb_itself_out_of_reach_stops_nothing(tmp_path: Path) -> None:
    address = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}
    notes, said = _with_wandb(tmp_path, WANDB_API_KEY=KEY, **address)
    assert notes.startswith("W&B is not reached")
    assert len(notes.splitlines()) == 1
    assert said == ""


def test_wandb_itself_without_a_key_stops_nothing(tmp_path: Path) -> None:
    notes, _ = _with_wandb(tmp_path)
    assert "wandb login" in notes
