import json
import math

import pytest

from moe_svd_distill.training.progress import Point, Progress


def _at(*curve: float) -> Progress:
    """A run of 12 steps that was measured so, with a step since then."""
    points = [Point(step, 10 * step, 0.0, None, kl, 0.1) for step, kl in enumerate(curve)]
    return Progress(12, step=len(curve), curve=points, losses=[0.5])


def test_a_save_gives_back_where_a_run_stood() -> None:
    progress = _at(1.0, 0.9)
    progress.rejected = ["damaged"]
    record = json.loads(json.dumps(progress.record()))
    found = Progress.of_save(record, 12)
    assert found.curve == progress.curve
    assert (found.step, found.losses, found.resumed_at, found.rejected) == (2, [0.5], 2, [])


def test_a_save_of_an_earlier_version_is_read() -> None:
    record = {"step": 3, "seconds": 1.5, "curve": [], "best": 0, "losses": [], "halvings": 1, "ended": ""}
    found = Progress.of_save(record, 12)
    assert (found.steps, found.step, found.halvings, found.over) == (12, 3, 1, False)


@pytest.mark.parametrize(("curve", "kl", "best"), [((1.0,), 0.9, True), ((1.0, 0.8), 0.9, False)])
def test_the_lowest_point_is_the_best(curve: tuple[float, ...], kl: float, best: bool) -> None:
    progress = _at(*curve)
    progress.best = len(curve) - 1
    assert progress.note(kl, 40, 0.1, patience=5) is best
    assert progress.losses == []
    assert progress.curve[-1].loss == 0.5
    assert not progress.over


@pytest.mark.parametrize("kl", [3.01, math.inf, math.nan])
def test_a_run_that_diverges_is_over(kl: float) -> None:
    progress = _at(1.0)
    assert not progress.note(kl, 40, 0.1, patience=5)
    assert progress.ended == "diverged"
    assert progress.over


def test_a_bad_beginning_is_begun_anew_as_often_as_was_asked() -> None:
    progress = _at(1.0)
    assert progress.begins_badly(1.0, halvings=1)
    assert progress.begins_badly(math.nan, halvings=1)
    assert not progress.begins_badly(0.99, halvings=1)
    progress.begin_anew()
    assert (progress.step, progress.halvings, progress.losses) == (0, 1, [])
    assert not progress.begins_badly(1.0, halvings=1)
