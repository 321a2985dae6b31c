"""The scale search on calibration text, as the pipeline uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.streaming import GROUPS, group_of

if TYPE_CHECKING:
    from moe_svd_distill.algebra.figures import Measurement
    from moe_svd_distill.calibration.paired import PairedText
    from moe_svd_distill.evaluation.guard import Kind
    from moe_svd_distill.evaluation.scale_search import ScaleSearch
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.stage import StageResult

Report = Callable[[float], None]


@dataclass(frozen=True)
class ScaleDecision:
    """What the search decided.

    Attributes:
        scales: Group to the factor on its deltas.
        kind: Whether the adapter is kept, and if not, why; None where nothing was measured.
        text: The decision in a sentence or two for people.
        details: Everything that was tried, for the record.
    """

    scales: Mapping[str, float]
    kind: Kind | None
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def keep(cls) -> ScaleDecision:
        """No change of scale."""
        return cls(dict.fromkeys(GROUPS, 1.0), None, "")

    @classmethod
    def of(cls, search: ScaleSearch, text: str = "", **details: Any) -> ScaleDecision:
        """What a search found, with more to say before it and to write down beside it."""
        found = search.as_dict()
        known = {name: value for name, value in found.items() if name not in ("scales", "kind", "decision")}
        return cls({**search.scales}, search.kind, text + search.decision, known | details)

    @property
    def transferred(self) -> bool | None:
        """Whether the adapter is proven to help on calibration text; None where nothing was measured."""
        return None if self.kind is None else self.kind == "kept"

    def as_dict(self) -> dict[str, object]:
        """For run.json."""
        return {**self.details, "scales": dict(self.scales), "kind": self.kind, "decision": self.text}


def not_searched(reason: str) -> ScaleDecision:
    """The decision where there is nothing to decide by."""
    text = f"Not measured: {reason}; whether this adapter helps or harms is not known."
    return ScaleDecision(dict.fromkeys(GROUPS, 1.0), None, text)


def combined_decision(
    weights: ScaleDecision | None, fitted: StageResult | None, refined: StageResult | None = None
) -> ScaleDecision:
    """What the searches of the stages say together."""
    if refined is not None:
        before = combined_decision(weights, fitted)
        started = {"start": dict(before.details)} if before.details else {}
        return ScaleDecision.of(refined.search, "Trained: ", **started)
    if fitted is None:
        return weights or ScaleDecision.keep()
    search, own = fitted.search, ScaleDecision.of(fitted.search)
    if weights is None:
        return own
    text = f"Weights: {weights.text} Calibrated head, on top: {search.decision}"
    scales = {**weights.scales} | ({"head": 1.0} if search.accepted else {})
    details = {"weights": weights.as_dict(), "calibrated": own.as_dict()}
    return ScaleDecision(scales, _of_both(weights.kind, search.kind), text, details)


def _of_both(weights: Kind | None, fit: Kind) -> Kind:
    """Something is kept if one of the two is; what is not proven may still be."""
    kinds: tuple[Kind, ...] = ("kept", "unproven", "harm", "none")
    return next(kind for kind in kinds if kind in (weights, fit))


def decide_scale(
    adapter_folder: Path, pair: ModelPair, text: PairedText, device: str, cache: Path, report: Report
) -> ScaleDecision:
    """Measure the adapter at several scales on calibration text, one pass of the student each, and keep what helps.

    Args:
        adapter_folder: The adapter at scale 1.
        pair: Teacher and student.
        text: What to measure on.
        device: Where the models run.
        cache: Where streamed states lie.
        report: Told the fraction done.
    """
    import torch

    from moe_svd_distill.evaluation.scale_search import GLOBAL_SCALES, search_scale
    from moe_svd_distill.streaming import PassSettings, ScaledAdapter, load_head, stream_states
    from moe_svd_distill.training.measuring import StatePairs, measure_states, predicting_places

    settings, places, student = PassSettings((device,)), predicting_places(text), pair.student.checkpoint
    teacher = load_head(pair.teacher.checkpoint, device, torch.float32, tokens=text.teacher_ids)
    pairs = LowRankPairs(adapter_folder, pair.student.architecture)
    present = set(map(group_of, pairs.parameter_ranks())) | ({"head"} if pairs.head else set())
    groups = tuple(group for group in GROUPS if group in present)
    most, done = len(GLOBAL_SCALES) + 2 + 2 * len(groups), 0
    with stream_states(pair.teacher.checkpoint, text.teacher.sequences, cache, settings) as theirs:

        def at(scales: Mapping[str, float]) -> Measurement:
            nonlocal done
            acting = any(scales.values())
            adapter = ScaledAdapter(adapter_folder, scales) if acting else None
            head = load_head(student, device, torch.float32, tokens=text.student_ids, adapter=adapter)
            leaving = replace(settings, keep=not acting)
            with stream_states(student, text.student.sequences, cache, leaving, adapter=adapter) as mine:
                states = StatePairs(
                    mine.rows(slice(None)).flatten(0, 1),
                    theirs.rows(slice(None)).flatten(0, 1),
                    places.student_position,
                    places.teacher_position,
                )
                measured = measure_states(states, places, head, teacher)
            done += 1
            report(min(1.0, done / most))
            return measured

        found = search_scale(at, groups)
    return ScaleDecision.of(found, tokens=text.student.tokens)
