"""Bars on a terminal: every row whole at any width, with what is done, the time taken and the time left."""

from __future__ import annotations

import io

import pytest

from moe_svd_distill.cli import progress, screen
from moe_svd_distill.execution import events

NAMES = (
    "training",
    "reading the text: student, its own text 3",
    "preparing the student, and what the loss needs of the teacher",
    "reading: student on calibration text, layer by layer",
)


def _rows(width: int, monkeypatch: pytest.MonkeyPatch, *told: events.Event) -> list[str]:
    console = screen._Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    bars = progress._Bars()
    for event in told:
        bars.take(event)
    shown = bars._progress
    with console.capture() as captured:
        console.print(shown.make_tasks_table(shown.tasks))
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_row_is_whole_and_fits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [events.UnitsPlanned((("layer 12, experts 3-7", 5), ("head", 5)))]
    workers = [events.WorkerStarted(0, "cuda:0", 1), events.UnitStarted(0, "layer 12, experts 3-7", 2)]
    named = [name for name in NAMES if len(name) < width - 20]
    stages = [events.StageReached(name, 0.25) for name in named]
    rows = _rows(width, monkeypatch, *units, *workers, *stages, events.StageReached("writing the adapter"))
    assert len(rows) == 3 + len(stages)
    assert max(map(len, rows)) <= width
    for row, said in zip(rows, ["weights stage  0/2 units", "  worker 0 on cuda:0", *named], strict=False):
        assert row.startswith(said)
    assert all(row.rstrip().endswith(":--") or row.rstrip()[-7:].count(":") == 2 for row in rows)


@pytest.mark.parametrize("width", [80, 120])
def test_a_download_shows_its_bytes(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "downloading Qwen/Qwen2.5-Coder-1.5B-Instruct"
    (row,) = _rows(width, monkeypatch, events.StageReached.counted(name, 1_200_000_000, 3_090_000_000))
    assert row.startswith(f"{name}  1.20 of 3.09 GB ")
    assert row.rstrip().endswith(" 0:00:00 -:--:--")
    assert len(row) <= width
