"""What the pages say, in words and numbers: mostly about training."""

from __future__ import annotations

import pytest

from moe_svd_distill.report import facts
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.facts import training_note
from tests.support.run_records import content, record, refinement, trained_record

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


def test_means_over_experts_and_holes() -> None:
    found = facts.grid(record(), "relative_delta")
    assert found is not None
    assert found.layers == ("0", "1", "2", "ends")
    row = found.values[found.roles.index("experts.gate")]
    assert row[:3] == pytest.approx((0.4, 0.4, 0.4))
    assert row[3] is None
    assert found.values[found.roles.index("head")] == (None, None, None, 0.2)
    assert facts.grid(record(tensors=[]), "relative_delta") is None
    nothing = [tensor | {"relative_delta": None} for tensor in content()["tensors"]]
    assert facts.grid(record(tensors=nothing), "relative_delta") is None


def test_a_role_without_the_value_has_no_row() -> None:
    tensors = [tensor for tensor in content()["tensors"] if tensor["role"] != "head"]
    unmeasured = {"name": "lm_head", "role": "head", "layer": None, "fate": "lora", "rank": 40}
    found = facts.grid(record(tensors=[*tensors, unmeasured]), "relative_delta")
    assert found is not None
    assert "head" not in found.roles
    assert found.layers == ("0", "1", "2")
    assert len(found.values) == len(found.roles)


def test_negative_figures_have_a_minus_sign_and_options_their_hyphens() -> None:
    decision = "Nothing: KL moves by -0.2% (-1.0% to +0.6%). Give --scale-search-tokens 4096 of Qwen-2."
    assert facts.decision(record(scale_search={"decision": decision})) == (
        "Nothing: KL moves by −0.2% (−1.0% to +0.6%). Give --scale-search-tokens 4096 of Qwen-2."
    )
