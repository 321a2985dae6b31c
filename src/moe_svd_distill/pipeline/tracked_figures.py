"""What trackers are told: a point of the training curve, what a scale search found, and what an evaluation found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_svd_distill.evaluation.scale_search import ScaleDecision
    from moe_svd_distill.training.progress import Point


def point_figures(point: Point) -> Mapping[str, float]:
    """Loss (none before training) and KL in nats per token, the factors' learning rate, tokens and seconds so far."""
    loss = {} if point.loss is None else {"loss": point.loss}
    return loss | {"kl": point.kl, "learning_rate": point.rate, "tokens": point.tokens, "seconds": point.seconds}


def search_figures(decision: ScaleDecision) -> Mapping[str, float]:
    """Each group's scale, and KL of the untouched student and with what is kept, in nats per token."""
    trials = decision.trials
    kept = next((trial for trial in trials if trial.scales == decision.scales), trials[0])
    scales = {f"scale_{group}": scale for group, scale in decision.scales.items()}
    return {**scales, "kl_before": trials[0].kl, "kl": kept.kl}


def evaluation_figures(evaluation: Mapping[str, Any]) -> Mapping[str, float]:
    """Means of each model, gaps closed in percent, and scores of benchmarks, of an evaluation.json."""
    return {name: value for name, value in _figures(evaluation) if isinstance(value, int | float)}


def _figures(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for who in ("student", "adapted", "teacher"):
        for name in ("kl", "cross_entropy", "top1_agreement"):
            yield f"{who}_{name}", evaluation.get(who, {}).get(name)
    for name in ("kl", "cross_entropy"):
        yield f"{name}_gap_closed", evaluation.get("gap_closed", {}).get(name)
    for score in (evaluation.get("benchmarks") or {}).get("scores", ()):
        for who in ("student", "adapted"):
            yield f"{who}_{score['task']}_{score['metric']}_{score['filter']}", score[who]
    for task, found in (evaluation.get("code_benchmarks") or {}).items():
        for who in ("student", "adapted", "teacher"):
            yield f"{who}_{task}_pass_at_1", (found.get(who) or {}).get("pass_at_1")
