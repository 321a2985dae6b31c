"""Lines where nobody sees a bar, by a clock that the test moves."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from moe_svd_distill.cli.lines import Lines, _Stage
from moe_svd_distill.execution import events


@dataclass
class _Watched:
    """A log file's lines, each with the second it was written at."""

    now: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.display = Lines(lambda text: self.lines.append((self.now, text)), lambda: self.now)

    def passes(self, seconds: float) -> None:
        """The thread looks once a second."""
        for _ in range(round(seconds)):
            self.now += 1
            self.display.look()

    @property
    def said(self) -> list[str]:
        return [text for _, text in self.lines]

    @property
    def longest_silence(self) -> float:
        times = [0.0, *(at for at, _ in self.lines), self.now]
        return max(later - earlier for earlier, later in pairwise(times))


def test_a_stage_has_a_line_when_it_has_lasted_a_while_and_one_every_half_minute() -> None:
    run = _Watched()
    run.display.take(events.StageReached("training", 0.0))
    run.passes(2)
    assert run.said == []
    for percent in range(1, 11):
        run.display.take(events.StageReached("training", percent / 10))
        run.passes(10)
    assert run.said[:2] == ["training, for 3 s: 10%, about 30 s left", "training, for 33 s: 40%, about 50 s left"]
    assert len(run.said) == 4
    run.display.take(events.StageReached("writing the adapter"))
    run.passes(4)
    assert run.said[-1] == "writing the adapter, for 3 s"


def test_short_stages_have_no_line_yet_there_is_always_one_within_forty_seconds() -> None:
    run = _Watched()
    for number in range(60):
        run.display.take(events.StageReached(f"reading: {number}", 0.0))
        run.passes(2)
    assert len(run.said) == 3
    assert "for 0 s" not in "".join(run.said)
    assert run.longest_silence < 40


@pytest.mark.parametrize(
    "event",
    [
        events.UnitsPlanned((("layer 0", 5),)),
        events.StageReached("training", 0.1),
        events.StageReached("checking that PEFT loads it"),
        events.StageReached.counted("reading: adapter", 10, 100),
        events.StageReached.counted("humaneval: the student writes", 0, 164),
        events.StageReached.counted("downloading org/model", 10**9, 10**10),
    ],
)
def test_a_stage_that_hangs_is_never_silent_for_forty_seconds(event: events.Event) -> None:
    run = _Watched()
    run.display.take(event)
    run.passes(3600)
    assert run.longest_silence < 40
    assert len(run.said) > 100


def test_units_count_by_their_costs_and_as_far_as_they_are() -> None:
    run = _Watched()
    run.display.take(events.UnitsPlanned((("layer 0", 60), ("layer 1", 30), ("head", 10))))
    run.display.take(events.UnitFinished(None, "head", 0.0, reused=True))
    run.display.take(events.UnitStarted(0, "layer 0", 1))
    run.passes(29)
    run.display.take(events.UnitProgress(0, "layer 0", 0.5))
    run.passes(5)
    assert run.said == ["weights stage, for 3 s: 10%", "weights stage, for 33 s: 40%, about 70 s left"]
    run.display.take(events.UnitFinished(0, "layer 0", 34.0, reused=False))
    run.display.take(events.UnitFinished(0, "layer 1", 34.0, reused=False))
    run.passes(30)
    assert run.said[-1].endswith(": 100%")


def test_a_download_has_its_bytes() -> None:
    run = _Watched()
    run.display.take(events.StageReached.counted("downloading org/model", 0, 4_800_000_000))
    run.passes(2)
    run.display.take(events.StageReached.counted("downloading org/model", 1_200_000_000, 4_800_000_000))
    run.passes(8)
    assert run.said == ["downloading org/model, for 3 s: 25% (1.20 of 4.80 GB), about 10 s left"]


def test_a_stage_that_begins_anew_is_timed_from_there() -> None:
    run = _Watched()
    run.display.take(events.StageReached("training", 0.5))
    run.passes(20)
    run.display.take(events.StageReached("training", 0.01))
    run.passes(10)
    run.display.take(events.StageReached("training", 0.02))
    run.passes(5)
    assert run.said[-1] == "training, for 13 s: 2%, about 21 min left"


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (_Stage("reading", 100.0, 0.0, 0.25), "reading, for 30 s: 25%, about 2 min left"),
        (_Stage("reading", 100.0, 0.5, 0.75), "reading, for 30 s: 75%, about 30 s left"),
        (_Stage("reading", 100.0, 0.25, 0.25), "reading, for 30 s: 25%"),
        (_Stage("reading", 100.0, 0.0, 1.0), "reading, for 30 s: 100%"),
        (_Stage("checking", 100.0, 0.0, None), "checking, for 30 s"),
        (_Stage("reading", 130.0, 0.0, 0.5), "reading: 50%"),
    ],
)
def test_what_is_left_follows_from_the_speed_of_the_stage(stage: _Stage, expected: str) -> None:
    assert stage.line(130.0) == expected


def test_a_thread_looks_by_itself_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_svd_distill.cli.lines.LOOK_S", 0.02)
    monkeypatch.setattr("moe_svd_distill.cli.lines.SOON_S", 0.1)
    lines: list[str] = []
    display = Lines(lines.append)
    display.start()
    display.take(events.StageReached("training", 0.0))
    deadline = time.monotonic() + 10
    while not lines and time.monotonic() < deadline:
        time.sleep(0.01)
    display.stop()
    display.take(events.StageReached("writing the adapter"))
    time.sleep(0.3)
    assert [line.partition(",")[0] for line in lines] == ["training"]
