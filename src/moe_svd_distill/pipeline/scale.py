"""The scale search on calibration text, as the pipeline uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.evaluation.scale_search import ScaleDecision
from moe_svd_distill.streaming import GROUPS, group_of

if TYPE_CHECKING:
    from moe_svd_distill.algebra.figures import Measurement
    from moe_svd_distill.calibration.paired import PairedText
    from moe_svd_distill.evaluation.guard import Kind
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.schedule import TrainingSchedule
    from moe_svd_distill.pipeline.stage import StageInput, StageResult
    from moe_svd_distill.pipeline.stage_text import Report
    from moe_svd_distill.training.head_rank import MovingHead
    from moe_svd_distill.training.job import StudentInTraining
    from moe_svd_distill.training.text import TrainingText

KEPT_WHOLE = ScaleDecision(dict.fromkeys(GROUPS, 1.0), None, "")
"""No change of scale."""


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
        started = {"start": before.details} if before.details else {}
        return replace(refined.search, decision=f"Trained: {refined.search.decision}", beside=started)
    if fitted is None:
        return weights or KEPT_WHOLE
    search = fitted.search
    if weights is None:
        return search
    text = f"Weights: {weights.decision} Calibrated head, on top: {search.decision}"
    scales = {**weights.scales} | ({"head": 1.0} if search.accepted else {})
    both = {"weights": weights.as_dict(), "calibrated": search.as_dict()}
    return ScaleDecision(scales, _of_both(weights.kind, search.kind), text, beside=both)


def _of_both(weights: Kind | None, fit: Kind | None) -> Kind:
    """Something is kept if one of the two is; what is not proven may still be."""
    kinds: tuple[Kind, ...] = ("kept", "unproven", "harm", "none")
    return next(kind for kind in kinds if kind in (weights, fit))


def decide_scale(
    adapter_folder: Path, pair: ModelPair, text: PairedText, device: str, cache: Path, report: Callable[[float], None]
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
    return replace(found, beside={"tokens": text.student.tokens})


def decide_trained_scale(
    given: StageInput,
    schedule: TrainingSchedule,
    text: TrainingText,
    trainee: StudentInTraining,
    moving: MovingHead | None,
    report: Report,
) -> ScaleDecision:
    """Measure a student in training at the scales of its schedule; nothing to keep is a valid answer.

    Args:
        given: Of the stage.
        schedule: Of the training.
        text: The search text, with what training needs of it.
        trainee: The trained student.
        moving: Its head, where that moves.
        report: Told the name of a step and the fraction done.
    """
    import torch

    from moe_svd_distill.algebra.figures import Measurement
    from moe_svd_distill.evaluation.scale_search import search_scale
    from moe_svd_distill.streaming import load_head
    from moe_svd_distill.training.fixed_head import FixedHead
    from moe_svd_distill.training.measuring import predicting_places

    places, head = predicting_places(given.text.search), trainee.head
    with ExitStack() as stack:
        if isinstance(head, FixedHead):
            told = partial(report, "working out what the scale search needs of the teacher")
            told(0.0)
            checkpoint, tokens = given.pair.teacher.checkpoint, given.fit_text.teacher_ids
            teacher = load_head(checkpoint, given.settings.devices[0], torch.float32, tokens=tokens)
            expecting = head.with_expectations(text, teacher, 0.0, given.folder, "search", told)
            text, best = stack.enter_context(expecting)
        measured, expected = count(), 1 + len(schedule.scales)  # the untouched student, and each scale

        def at(scales: Mapping[str, float]) -> Measurement:
            scale = scales[schedule.stage]
            done = min(next(measured) / expected, 0.9)  # a scale between two may be tried as well
            report("searching the scale of what was trained", done)
            if moving is not None:
                return moving.figures(scale, text, places)
            assert isinstance(head, FixedHead)
            states, target = trainee.states_of(text, scale), torch.from_numpy(places.target)
            columns = head.figures(states, text.teacher, best, target)
            return Measurement.of_tokens(columns.double().numpy(), places.unit)

        return search_scale(at, (schedule.stage,), global_scales=schedule.scales)
