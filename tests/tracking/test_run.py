"""A run as trackers see it: one, each point once, and never in its way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moe_svd_distill.errors import MissingInputError, UsageError
from moe_svd_distill.execution.events import Event, Measured, Noted, StageReached, UnitsPlanned
from moe_svd_distill.tracking import require_trackers, run, tracked
from moe_svd_distill.tracking.trackers import RunPlace


@dataclass
class _Kept:
    """What trackers of all processes were told."""

    places: list[RunPlace] = field(default_factory=list)
    written: list[tuple[str, int | None]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    fails: bool = False

    def __call__(self, place: RunPlace) -> _Kept:
        self.places.append(place)
        return self

    def write(self, part: str, figures: Mapping[str, float], step: int | None) -> None:
        if self.fails:
            raise OSError("out of reach")
        self.written.append((part, step))

    def close(self, *, failed: bool) -> None:
        self.ended.append(failed)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> _Kept:
    tracker = _Kept()
    monkeypatch.setattr(run, "TRACKERS", {"wandb": tracker})
    return tracker


def _points(folder: Path, *steps: int, asked: Mapping[str, object] | None = None) -> list[Event]:
    told: list[Event] = []
    with tracked(["wandb"], folder, told.append, {} if asked is None else asked) as tell:
        for step in steps:
            tell(Measured("refined", {"kl": 1.0}, step))
    return told


def test_a_run_that_goes_on_is_the_same_and_has_each_point_once(tmp_path: Path, kept: _Kept) -> None:
    _points(tmp_path, 0, 10, 20)
    _points(tmp_path, 0, 10, 20, 30)
    assert kept.written == [("refined", step) for step in (0, 10, 20, 30)]
    assert kept.places[0].identity == kept.places[1].identity
    with tracked(["wandb"], tmp_path, lambda event: None) as tell:  # an evaluation, which knows of no recipe
        tell(Measured("evaluation", {"kl": 1.0}))
    assert kept.places[2].identity == kept.places[0].identity
    assert kept.written[-1] == ("evaluation", None)


def test_another_recipe_is_another_run(tmp_path: Path, kept: _Kept) -> None:
    _points(tmp_path, 0, asked={"rank": 8})
    _points(tmp_path, 0, asked={"rank": 16})
    assert kept.places[0].identity != kept.places[1].identity
    assert kept.written == [("refined", 0)] * 2


def test_a_damaged_record_of_the_run_begins_another(tmp_path: Path, kept: _Kept) -> None:
    _points(tmp_path, 0)
    for damaged in ("{", "[]", '{"run": "a"}', '{"run": "a", "asked": "b", "more": 1}'):
        (tmp_path / "trackers.json").write_text(damaged)
        _points(tmp_path, 0)
    assert len({place.identity for place in kept.places}) == 5


def test_stages_are_timed_over_all_processes(tmp_path: Path, kept: _Kept) -> None:
    for _ in range(2):
        with tracked(["wandb"], tmp_path, lambda event: None, {}) as tell:
            tell(UnitsPlanned(()))
            tell(StageReached("training", 0.1))
            tell(StageReached("training", 0.2))
            tell(StageReached("writing the adapter"))
    assert kept.written == [("seconds", None)] * 6
    seconds = json.loads((tmp_path / "trackers.json").read_text())["seconds"]
    assert set(seconds) == {"weights stage", "training", "writing the adapter"}


def test_a_tracker_that_fails_is_told_of_once_and_everything_is_told_on(tmp_path: Path, kept: _Kept) -> None:
    kept.fails = True
    told = _points(tmp_path, 0, 10, 20)
    notes = [event.text for event in told if isinstance(event, Noted)]
    assert notes == ["report_to: wandb failed and gets nothing any more (out of reach)"]
    assert sum(isinstance(event, Measured) for event in told) == 3
    assert kept.ended == []


def test_trackers_know_whether_a_run_failed(tmp_path: Path, kept: _Kept) -> None:
    _points(tmp_path, 0)
    with pytest.raises(KeyboardInterrupt), tracked(["wandb"], tmp_path, lambda event: None, {}):
        raise KeyboardInterrupt
    assert kept.ended == [False, True]


def test_nothing_is_written_without_a_tracker(tmp_path: Path) -> None:
    told: list[Event] = []
    with tracked([], tmp_path, told.append, {}) as tell:
        tell(Measured("refined", {"kl": 1.0}, 0))
    assert len(told) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_refused_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(MissingInputError, match=r"pip install 'moe-svd-distill\[wandb\]'"):
        require_trackers(["wandb"])
    with pytest.raises(UsageError, match="found 'mlflow', expected tensorboard or wandb"):
        require_trackers(["mlflow"])


def test_a_folder_named_like_the_library_is_not_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "surely_no_library").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(run, "TRACKERS", {"surely_no_library": None})
    with pytest.raises(MissingInputError):
        require_trackers(["surely_no_library"])
