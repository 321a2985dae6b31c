"""The pictures."""

from __future__ import annotations

from typing import Any

import pytest

from moe_svd_distill.evaluation.scale_search import ScaleDecision
from moe_svd_distill.files.typed import read_as
from moe_svd_distill.report import pictures
from moe_svd_distill.report.record import EvaluationRecord, FitRecord, TrainingRecord
from tests.support.pages import BLUE, GREEN, GREY, ORANGE, RED, share
from tests.support.run_records import content, evaluation, refinement


def training(**changes: Any) -> TrainingRecord:
    """How a refined stage trained."""
    return read_as(TrainingRecord, refinement(**changes))


def test_bars_are_as_long_as_their_figures() -> None:
    drawn = pictures.figures_picture(read_as(EvaluationRecord, evaluation()), kind="png")
    assert share(drawn, BLUE) / share(drawn, GREY) == pytest.approx(0.339 / 0.513, rel=0.1)


def _luminance(colour: tuple[int, int, int]) -> float:
    parts = [part / 255 for part in colour]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("ground", [(255, 255, 255), (13, 17, 23)])
@pytest.mark.parametrize("colour", [BLUE, GREEN, GREY, ORANGE, RED])
def test_colours_can_be_told_from_a_light_and_a_dark_page(
    colour: tuple[int, int, int], ground: tuple[int, int, int]
) -> None:
    low, high = sorted(map(_luminance, (colour, ground)))
    assert (high + 0.05) / (low + 0.05) >= 3


def test_the_scale_curve_needs_something_tried() -> None:
    search = content()["scale_search"]
    assert pictures.scale_picture(read_as(ScaleDecision, {})) is None
    assert pictures.scale_picture(read_as(ScaleDecision, {"trials": search["trials"][:1]})) is None
    drawn = pictures.scale_picture(read_as(ScaleDecision, search), kind="png")
    assert share(drawn, RED) > 1e-4  # the note that the curve leaves the picture


@pytest.mark.parametrize("layers", [(1, 1), (3, 5), (48, 92)])
def test_depth_maps_of_any_size(layers: tuple[int, int]) -> None:
    edges = [(student, student * layers[1] // layers[0], 1.0) for student in range(layers[0])]
    assert share(pictures.depth_picture(edges, layers, kind="png"), GREEN) > 1e-4


def test_the_curve_shows_loss_and_kl_and_marks_what_was_kept() -> None:
    drawn = pictures.curve_picture(training(), kind="png")
    assert all(share(drawn, colour) > 1e-4 for colour in (BLUE, ORANGE, GREEN))
    fit = read_as(FitRecord, {"kl_by_pass": [0.5, 0.4, None], "best_pass": 1})
    assert share(pictures.fit_picture(fit, kind="png"), GREEN) > 1e-4
    assert pictures.fit_picture(read_as(FitRecord, {})) is None
    unmarked = pictures.curve_picture(training(best=None), kind="png")
    assert share(unmarked, GREEN) == 0
    assert pictures.curve_picture(training()) == pictures.curve_picture(training())


@pytest.mark.parametrize("changes", [{"curve": []}, {"curve": refinement()["curve"][:1]}, {"curve": None}])
def test_a_curve_needs_two_points(changes: dict[str, Any]) -> None:
    assert pictures.curve_picture(training(**changes)) is None
    assert pictures.curve_picture(None) is None


@pytest.mark.parametrize("kl", [float("nan"), float("inf"), 40.0])
def test_a_training_that_diverged_can_be_drawn(kl: float) -> None:
    curve = [
        *refinement()["curve"],
        {"step": 400, "tokens": 409_600, "seconds": 1.0, "loss": kl, "kl": kl, "rate": 0.0},
    ]
    drawn = pictures.curve_picture(training(curve=curve, ended="diverged"), kind="png")
    assert share(drawn, GREEN) > 1e-4


def test_a_loss_of_another_kind_does_not_squeeze_the_kl() -> None:
    curve = [point | {"loss": None if point["loss"] is None else point["loss"] + 4} for point in refinement()["curve"]]
    settings = {"divergence": "forward", "cross_entropy_share": 0.5}
    drawn = pictures.curve_picture(training(curve=curve, settings=settings), kind="png")
    assert share(drawn, ORANGE) > 1e-4
