"""What the pages say about training, and the picture of its curve."""

from __future__ import annotations

from typing import Any

import pytest

from moe_svd_distill.report import facts, pictures
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.html import html_report
from moe_svd_distill.report.training import training_note
from tests.report.samples import record, refinement, trained_record
from tests.report.test_html import _parsed, _share

BLUE, ORANGE, GREEN = (31, 111, 235), (212, 130, 30), (45, 164, 78)
TEACHER = "**big-teacher**"


def test_the_note_says_how_much_how_long_where_and_from_what() -> None:
    assert training_note(trained_record()) == (
        "Trained on 131,072 tokens, 3 times over, in 384 steps of 1,024 tokens, for 1,812 seconds, in memory, on "
        "2 × cpu; all planned steps were done. KL on calibration text fell from 0.5130 to 0.3510 at step 288, which "
        "was kept. It began with the adapter of the weights and calibrated stages."
    )


def test_the_note_of_a_training_that_was_stopped() -> None:
    stopped = refinement(ended="no more gain", steps=960, placement={"resident": False, "devices": ["cuda:0"]})
    note = training_note(trained_record(refinement=stopped))
    assert "in 384 of 960 steps" in note
    assert "one layer in memory at a time, on cuda:0; it was stopped early" in note
    assert "steps of 1,024 tokens" in training_note(
        trained_record(refinement=refinement(settings={"step_tokens": 1500}))
    )
    useless = training_note(trained_record(refinement=refinement(best=0, ended="diverged")))
    assert "was 0.5130 before and never lower, so nothing of the training was kept" in useless
    assert "it diverged" in useless


@pytest.mark.parametrize(("from_start", "words"), [(True, "where training began"), (False, "with the untouched")])
def test_the_note_says_where_the_trials_of_the_rate_began(from_start: bool, words: str) -> None:
    trials = [{"rate": 0.01, "before": 0.5, "after": 0.4}, {"rate": 0.005, "before": 0.5, "after": 0.3}]
    tried = refinement(settings={"rate": 0.005}, rate_trials=trials, rate_tried_from_start=from_start)
    note = training_note(trained_record(refinement=tried))
    assert f"The learning rate, 0.005, was the best of 2 in short trials that began {words}" in note


@pytest.mark.parametrize(
    ("method", "start", "expected"),
    [
        ("refined", "zero", "the untouched student"),
        ("refined", "/home/someone/earlier", "the adapter earlier"),
        ("calibrated+refined", "auto", "the adapter of the calibrated stage"),
        ("weights+refined", "weights", "the adapter of the weights stage"),
    ],
)
def test_what_training_began_with(method: str, start: str, expected: str) -> None:
    made = trained_record(method=method, recipe={"start": start})
    assert training_note(made).endswith(f"It began with {expected}.")
    assert "/home/someone" not in adapter_card(made)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("refined", f"trained on the distributions of the teacher {TEACHER} on calibration text by"),
        ("calibrated+refined", f"fitted to and then trained on the distributions of the teacher {TEACHER} on"),
        ("weights+refined", f"computed from the weights of the teacher {TEACHER} and then trained on its"),
        ("weights+calibrated+refined", f"weights of the teacher {TEACHER}, then fitted to and trained on its"),
    ],
)
def test_the_card_says_what_the_adapter_comes_from(method: str, words: str) -> None:
    assert words in adapter_card(trained_record(method=method))


def test_an_adapter_that_was_begun_with_is_named() -> None:
    card = adapter_card(trained_record(method="refined", recipe={"start": "adapters/first"}))
    assert "on calibration text, beginning with the adapter first by MoE-SVD-Distill" in card


def test_card_and_page_hold_the_note_and_the_headline_stays() -> None:
    made = trained_record()
    assert f"## Training\n\n{training_note(made)}\n" in adapter_card(made)
    page = html_report(made)
    assert f"<h2>Training</h2>\n<p>{training_note(made)}</p>" in page
    assert len(_parsed(page).addresses) == 7
    assert 'alt="Training loss and KL on calibration text by tokens trained on' in page
    assert facts.headline(made) == facts.headline(record())


def test_a_run_without_training_says_nothing_of_it() -> None:
    assert training_note(record()) == ""
    assert "## Training" not in adapter_card(record())
    assert "<h2>Training</h2>" not in html_report(record())


@pytest.mark.parametrize("key", list(refinement()))
def test_any_part_may_be_absent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_file", lambda figure, kind: b"drawn")
    for changed in ({name: value for name, value in refinement().items() if name != key}, refinement(**{key: None})):
        made = trained_record(refinement=changed)
        _parsed(html_report(made))
        assert "## Training" in adapter_card(made)


def test_the_curve_shows_loss_and_kl_and_marks_what_was_kept() -> None:
    drawn = pictures.curve_picture(refinement(), kind="png")
    assert drawn is not None
    assert all(_share(drawn, colour) > 1e-4 for colour in (BLUE, ORANGE, GREEN))
    unmarked = pictures.curve_picture(refinement(best=None), kind="png")
    assert unmarked is not None
    assert _share(unmarked, GREEN) == 0
    assert pictures.curve_picture(refinement()) == pictures.curve_picture(refinement())


@pytest.mark.parametrize("changes", [{"curve": []}, {"curve": refinement()["curve"][:1]}, {"curve": None}])
def test_a_curve_needs_two_points(changes: dict[str, Any]) -> None:
    assert pictures.curve_picture(refinement(**changes)) is None
    assert pictures.curve_picture({}) is None


@pytest.mark.parametrize("kl", [float("nan"), float("inf"), 40.0])
def test_a_training_that_diverged_can_be_drawn(kl: float) -> None:
    curve = [
        *refinement()["curve"],
        {"step": 400, "tokens": 409_600, "seconds": 1.0, "loss": kl, "kl": kl, "rate": 0.0},
    ]
    drawn = pictures.curve_picture(refinement(curve=curve, ended="diverged"), kind="png")
    assert drawn is not None
    assert _share(drawn, GREEN) > 1e-4


def test_a_loss_of_another_kind_does_not_squeeze_the_kl() -> None:
    curve = [point | {"loss": None if point["loss"] is None else point["loss"] + 4} for point in refinement()["curve"]]
    settings = {"divergence": "forward", "cross_entropy_share": 0.5}
    drawn = pictures.curve_picture(refinement(curve=curve, settings=settings), kind="png")
    assert drawn is not None
    assert _share(drawn, ORANGE) > 1e-4
