"""The search over a made-up landscape whose truth is known, and over real models."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from moe_svd_distill.evaluation.adapted import AdaptedStudent
from moe_svd_distill.evaluation.figures import Measurement
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.evaluation.resident import measure, record_teacher
from moe_svd_distill.evaluation.scale_search import Evaluate, Guard, halves, search_scale
from tests.evaluation.conftest import Lab

GROUPS = ("attention", "experts", "head")


def _landscape(
    best: Mapping[str, float],
    depth: Mapping[str, float],
    *,
    noise: float = 0.0,
    entropy_ratio: float = 1.0,
    documents: int = 40,
    seed: int = 0,
) -> tuple[Evaluate, list[Mapping[str, float]]]:
    """KL of 1 with a bowl of the given depth around the best scale of each group; noise is new for every setting."""
    tokens = np.random.default_rng(seed).integers(80, 160, documents).astype(float)
    spread = 0.3 * np.random.default_rng(seed + 1).standard_normal(documents)
    calls: list[Mapping[str, float]] = []

    def evaluate(scales: Mapping[str, float]) -> Measurement:
        calls.append(scales)
        fall = sum(
            depth[g] * (1 - ((scales[g] - best[g]) / best[g]) ** 2) if best[g] else -depth[g] * scales[g] ** 2
            for g in GROUPS
        )
        rng = np.random.default_rng([seed, *(int(1000 * scales[g]) for g in GROUPS)])
        own = noise * rng.standard_normal(documents) * any(scales.values())
        kl = tokens * (1 + spread - fall + own)
        entropy = tokens * (4 + spread - entropy_ratio * fall + own)
        return Measurement(kl, entropy, 0.5 * tokens, tokens)

    return evaluate, calls


def test_the_best_scale_is_found_and_confirmed() -> None:
    evaluate, calls = _landscape(dict.fromkeys(GROUPS, 0.6), dict.fromkeys(GROUPS, 0.1), noise=0.001)
    search = search_scale(evaluate, GROUPS)
    assert search.accepted
    assert all(scale == pytest.approx(0.6, abs=0.05) for scale in search.scales.values())
    assert search.confirmation is not None
    assert search.confirmation.kl_fall == pytest.approx(0.3, abs=0.02)
    assert len(calls) <= 16
    assert len(calls) == len(search.trials)
    assert "on text the scale was not chosen on, KL falls by 3" in search.decision


def test_confirming_on_other_text_costs_two_calls_there() -> None:
    evaluate, calls = _landscape(dict.fromkeys(GROUPS, 0.6), dict.fromkeys(GROUPS, 0.1), noise=0.001)
    confirm, confirmed = _landscape(dict.fromkeys(GROUPS, 0.6), dict.fromkeys(GROUPS, 0.05), noise=0.001, seed=5)
    search = search_scale(evaluate, GROUPS, confirm=confirm)
    assert search.accepted
    assert len(confirmed) == 2
    assert len(calls) == len(search.trials)
    assert search.trials[1].documents == 40
    assert search.confirmation is not None
    assert search.confirmation.kl_fall == pytest.approx(0.15, abs=0.01)
    harmful, _ = _landscape(dict.fromkeys(GROUPS, 0.0), dict.fromkeys(GROUPS, 1.0))
    assert not search_scale(evaluate, GROUPS, confirm=harmful).accepted


def test_each_group_gets_its_own_scale() -> None:
    evaluate, _ = _landscape({"attention": 0.0, "experts": 0.5, "head": 1.0}, dict.fromkeys(GROUPS, 0.1), noise=0.001)
    search = search_scale(evaluate, GROUPS)
    assert search.accepted
    assert search.scales["attention"] < 0.3
    assert search.scales["head"] > search.scales["experts"] > search.scales["attention"]


def test_a_good_group_survives_two_that_only_harm() -> None:
    depth = {"attention": 9.0, "experts": 9.0, "head": 0.1}
    evaluate, _ = _landscape({"attention": 0.0, "experts": 0.0, "head": 0.6}, depth, noise=0.001)
    search = search_scale(evaluate, GROUPS)
    assert search.accepted
    assert search.scales["attention"] == search.scales["experts"] == 0.0
    assert search.scales["head"] > 0.4


def test_what_harms_at_every_scale_is_scaled_to_nothing() -> None:
    evaluate, _ = _landscape(dict.fromkeys(GROUPS, 0.0), dict.fromkeys(GROUPS, 1.0))
    search = search_scale(evaluate, GROUPS)
    assert not search.accepted
    assert set(search.scales.values()) == {0.0}
    assert search.decision == (
        "Nothing was transferred: at every scale above 0 the adapter harms, or does not measurably help, "
        "the student on calibration text."
    )


def test_kl_bought_with_cross_entropy_is_no_transfer() -> None:
    evaluate, _ = _landscape(dict.fromkeys(GROUPS, 0.6), dict.fromkeys(GROUPS, 0.1), entropy_ratio=-0.5)
    assert not search_scale(evaluate, GROUPS).accepted


def test_a_gain_too_small_to_count() -> None:
    evaluate, _ = _landscape(dict.fromkeys(GROUPS, 0.5), dict.fromkeys(GROUPS, 0.004))
    search = search_scale(evaluate, GROUPS)
    assert not search.accepted
    assert "less than the 2% that would count" in search.decision
    assert search_scale(evaluate, GROUPS, guard=Guard(share=0.005)).accepted


def test_noise_is_not_taken_for_help() -> None:
    """With a threshold of 3 errors on text the scale was not chosen on, luck passes about once in 700."""
    accepted = 0
    for seed in range(100):
        evaluate, _ = _landscape(dict.fromkeys(GROUPS, 1.0), dict.fromkeys(GROUPS, 0.0), noise=0.2, seed=seed)
        accepted += search_scale(evaluate, GROUPS).accepted
    assert accepted <= 1


def test_halves_share_the_tokens_evenly() -> None:
    first, second = halves(np.array([100.0, 1, 1, 50, 49, 2]))
    assert sorted([*first, *second]) == list(range(6))
    assert {int(first.size), int(second.size)} <= {2, 3, 4}


def _on_models(lab: Lab, adapter: str) -> Evaluate:
    record = record_teacher(load_model(lab.teacher), lab.text)
    adapted = AdaptedStudent.load(load_model(lab.student), getattr(lab, adapter))

    def evaluate(scales: Mapping[str, float]) -> Measurement:
        adapted.set_scale(scales)
        return measure(adapted.model, record)

    return evaluate


def test_a_good_adapter_is_kept_whole(lab: Lab) -> None:
    search = search_scale(_on_models(lab, "good_adapter"), ("attention", "mlp", "head"))
    assert search.accepted
    assert set(search.scales.values()) == {1.0}


def test_a_random_adapter_is_scaled_to_nothing(lab: Lab) -> None:
    search = search_scale(_on_models(lab, "random_adapter"), ("attention", "mlp", "head"))
    assert not search.accepted
    assert set(search.scales.values()) == {0.0}
    assert search.decision.startswith("Nothing was transferred: ")
