"""The search over a made-up landscape whose truth is known, and over real models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation import guard
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.evaluation.scale_search import Evaluate, ScaleDecision, search_scale
from moe_svd_distill.pipeline.pair import open_pair
from moe_svd_distill.pipeline.scale import decide_scale
from tests.support.language import Lab

GROUPS, ONE = ("attention", "experts", "head"), ("all",)


def _landscape(
    best: Mapping[str, float],
    depth: Mapping[str, float],
    *,
    noise: float = 0.0,
    entropy_ratio: float = 1.0,
    documents: int = 40,
    seed: int = 0,
) -> tuple[Evaluate, list[Mapping[str, float]]]:
    """KL of 1 with a bowl of the given depth around the best scale of each group; noise is new for every setting, and
    grows with the scale as what an adapter changes does.
    """
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
        own = noise * rng.standard_normal(documents) * np.mean([scales[g] for g in GROUPS])
        kl = tokens * (1 + spread - fall + own)
        entropy = tokens * (4 + spread - entropy_ratio * fall + own)
        return Measurement(kl, entropy, 0.5 * tokens, tokens)

    return evaluate, calls


def _as_one(evaluate: Evaluate) -> Evaluate:
    """All groups at one scale."""
    return lambda scales: evaluate(dict.fromkeys(GROUPS, scales["all"]))


def test_the_best_scale_is_found_and_confirmed() -> None:
    evaluate, calls = _landscape(dict.fromkeys(GROUPS, 0.6), dict.fromkeys(GROUPS, 0.1), noise=0.001)
    search = search_scale(evaluate, GROUPS)
    assert search.accepted
    assert all(scale == pytest.approx(0.6, abs=0.05) for scale in search.scales.values())
    (kept,) = [trial for trial in search.trials if trial.scales == search.scales]
    assert kept.kl_fall == pytest.approx(0.3, abs=0.02)
    assert len(calls) <= 16
    assert len(calls) == len(search.trials)
    assert "on text that nothing was fitted on, KL falls by 29.8% (" in search.decision
    assert "in 40 of 40 documents" in search.decision


def test_small_scales_are_left_out_where_more_is_better_and_proven() -> None:
    evaluate, calls = _landscape(dict.fromkeys(GROUPS, 1.2), dict.fromkeys(GROUPS, 0.1), noise=0.001)
    search = search_scale(_as_one(evaluate), ONE)
    assert search.accepted
    assert [call["head"] for call in calls] == [0.0, 1.0, 0.75]


def test_between_the_best_and_one_that_is_not_proven_there_may_be_a_better() -> None:
    """Documents that the whole adapter spoils make it unproven; the bowl through three scales says where to look."""
    evaluate, calls = _landscape(dict.fromkeys(GROUPS, 0.65), dict.fromkeys(GROUPS, 0.1), documents=18)

    def spoilt(scales: Mapping[str, float]) -> Measurement:
        found = evaluate(scales)
        kl = found.kl.copy()
        kl[:6] += found.tokens[:6] * 0.45 * scales["head"] ** 6
        return Measurement(kl, found.cross_entropy, found.agreement, found.tokens)

    search = search_scale(_as_one(spoilt), ONE, global_scales=(0.25, 0.5, 1.0))
    whole = next(trial for trial in search.trials if trial.scales["all"] == 1.0)
    assert whole.kl_fall < guard.ERRORS * whole.kl_fall_error
    assert [call["head"] for call in calls[:4]] == [0.0, 1.0, 0.5, 0.25]
    assert 0.5 < calls[4]["head"] < 1.0
    assert search.accepted
    assert search.scales == max(search.trials, key=lambda trial: trial.kl_fall).scales


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
    assert search.kind == "harm"
    assert search.tokens_needed is None
    assert search.decision.startswith("Nothing was transferred: the adapter harms: at scale 1 KL rises by ")


def test_kl_bought_with_cross_entropy_is_no_transfer() -> None:
    evaluate, _ = _landscape(dict.fromkeys(GROUPS, 0.6), dict.fromkeys(GROUPS, 0.1), entropy_ratio=-0.5)
    search = search_scale(evaluate, GROUPS)
    assert search.kind == "harm"
    assert "KL falls by" in search.decision
    assert "and cross-entropy rises by" in search.decision


def test_a_gain_too_small_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, _ = _landscape(dict.fromkeys(GROUPS, 0.5), dict.fromkeys(GROUPS, 0.004))
    search = search_scale(evaluate, GROUPS)
    assert search.kind == "none"
    assert "less than the 2% that would" in search.decision
    monkeypatch.setattr(guard, "SHARE", 0.005)
    assert search_scale(evaluate, GROUPS).accepted


def test_noise_is_not_taken_for_help() -> None:
    """Noise that is new for every setting, three groups to choose among: luck passes less than once in 200."""
    kinds = []
    for seed in range(100):
        evaluate, _ = _landscape(dict.fromkeys(GROUPS, 1.0), dict.fromkeys(GROUPS, 0.0), noise=0.2, seed=seed)
        kinds.append(search_scale(evaluate, GROUPS).kind)
    assert kinds.count("kept") <= 2
    assert kinds.count("unproven") >= 90


def test_what_little_text_does_not_prove_is_not_blamed_on_the_adapter() -> None:
    evaluate, _ = _landscape(dict.fromkeys(GROUPS, 1.0), dict.fromkeys(GROUPS, 0.02), noise=0.1, documents=6)
    search = search_scale(evaluate, GROUPS)
    assert search.kind == "unproven"
    assert search.tokens_needed is not None
    assert search.decision.startswith("Nothing was transferred: not proven on so little text: at scale ")
    assert (
        f"Give more text, or --scale-search-tokens {search.tokens_needed}; what was computed is kept."
        in search.decision
    )
    assert "harm" not in search.decision
    more, _ = _landscape(
        dict.fromkeys(GROUPS, 1.0), dict.fromkeys(GROUPS, 0.02), noise=0.1, documents=search.tokens_needed // 100
    )
    assert search_scale(more, GROUPS).kind == "kept"


def test_a_gain_at_small_scales_is_kept_where_the_whole_adapter_harms() -> None:
    evaluate, _ = _landscape(dict.fromkeys(GROUPS, 0.3), dict.fromkeys(GROUPS, 0.03), noise=0.002)
    search = search_scale(_as_one(evaluate), ONE)
    whole = next(trial for trial in search.trials if set(trial.scales.values()) == {1.0})
    assert whole.kl_fall < 0
    assert search.accepted
    assert set(search.scales.values()) < {0.25, *np.round(np.arange(0.25, 0.5, 0.001), 3)}


def test_one_document_decides_nothing() -> None:
    evaluate, _ = _landscape(dict.fromkeys(GROUPS, 0.6), dict.fromkeys(GROUPS, 0.1), documents=1)
    search = search_scale(evaluate, GROUPS)
    assert search.kind == "unproven"
    assert "Give text of more documents" in search.decision


def _on_models(lab: Lab, adapter: Path, folder: Path) -> ScaleDecision:
    text = PairedText.read_alike(lab.text, load_model(lab.student).config.vocab_size)
    with open_pair(str(lab.teacher), str(lab.student)) as pair:
        return decide_scale(adapter, pair, text, "cpu", folder, lambda fraction: None)


def test_a_good_adapter_is_kept_whole(lab: Lab, tmp_path: Path) -> None:
    decision = _on_models(lab, lab.good_adapter, tmp_path)
    assert decision.accepted
    assert decision.scales == dict.fromkeys(("attention", "mlp", "head"), 1.0)


def test_a_random_adapter_is_scaled_to_nothing(lab: Lab, tmp_path: Path) -> None:
    decision = _on_models(lab, lab.random_adapter, tmp_path)
    assert not decision.accepted
    assert decision.scales == dict.fromkeys(("attention", "mlp", "head"), 0.0)
    assert decision.kind in ("harm", "none")
    assert decision.decision.startswith("Nothing was transferred: ")


@pytest.mark.parametrize("at", [0.0, 1.0])
def test_figures_that_are_no_numbers_are_no_verdict(at: float) -> None:
    evaluate, _ = _landscape(dict.fromkeys(GROUPS, 0.6), dict.fromkeys(GROUPS, 0.1))

    def broken(scales: Mapping[str, float]) -> Measurement:
        found = evaluate(scales)
        found.kl[3] = np.nan if scales["head"] == at else found.kl[3]
        return found

    with pytest.raises(BadDataError, match=f"the figures at scale attention {at:g}, .* are not finite"):
        search_scale(broken, GROUPS)
