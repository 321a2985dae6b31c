"""Lines where nobody sees a bar."""

from __future__ import annotations

import time

import pytest

from moe_svd_distill.cli.screen import ProgressLines, _Stage, duration


def test_a_line_when_a_stage_begins_and_at_intervals() -> None:
    lines: list[str] = []
    progress = ProgressLines(lines.append, every_s=0.05)
    progress.start()
    progress.reached("training", 0.0)
    progress.reached("training", 0.5)
    deadline = time.monotonic() + 10
    while len(lines) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    progress.reached("writing the adapter", None)
    progress.stop()
    assert lines[0] == "training"
    assert lines[1].startswith("training, for 0 s: 50%, about 0 s left")
    assert "writing the adapter" in lines
    before = len(lines)
    time.sleep(0.2)
    assert len(lines) == before


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (_Stage("reading", 100.0, 0.0, 0.25), "reading, for 30 s: 25%, about 1 min 30 s left"),
        (_Stage("reading", 100.0, 0.5, 0.75), "reading, for 30 s: 75%, about 30 s left"),
        (_Stage("reading", 100.0, 0.25, 0.25), "reading, for 30 s: 25%"),
        (_Stage("reading", 100.0, 0.0, 1.0), "reading, for 30 s: 100%"),
        (_Stage("checking", 100.0, 0.0, None), "checking, for 30 s"),
    ],
)
def test_what_is_left_follows_from_the_speed_of_the_stage(stage: _Stage, expected: str) -> None:
    assert stage.line(130.0) == expected


def test_durations_in_words() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 61, 7261)] == ["0 s", "59 s", "1 min 1 s", "2 h 1 min"]
