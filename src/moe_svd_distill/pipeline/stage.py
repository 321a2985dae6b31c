"""What a stage on text works with, what it makes, and what of it goes into run.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe_svd_distill.files.typed import as_json
from moe_svd_distill.report.record import FitRecord, TrainingRecord
from moe_svd_distill.streaming import ScaledAdapter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from moe_svd_distill.calibration.paired import PairedText
    from moe_svd_distill.evaluation.scale_search import ScaleDecision
    from moe_svd_distill.execution.supervisor import ExecutionSettings
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.schedule import TrainingSchedule
    from moe_svd_distill.pipeline.texts import RunText
    from moe_svd_distill.recipe import Recipe
    from moe_svd_distill.training.job import TrainingJob, TrainingReport
    from moe_svd_distill.training.lora_pairs import Pair
    from moe_svd_distill.training.settings import Placement


@dataclass(frozen=True, eq=False)
class StageInput:
    """What a stage on text works with.

    Attributes:
        recipe: What is asked for.
        pair: Teacher and student.
        text: From ``read_run_text``, with a part to train on.
        folder: The output's folder for parts, where training is saved.
        settings: Where to compute, and processes to use on the CPU.
        start: The adapter to begin with; None for none.
    """

    recipe: Recipe
    pair: ModelPair
    text: RunText
    folder: Path
    settings: ExecutionSettings
    start: ScaledAdapter | None

    @property
    def fit_text(self) -> PairedText:
        """The text to train on."""
        assert self.text.fit is not None
        return self.text.fit


@dataclass(frozen=True, eq=False)
class StageResult:
    """What a stage on text has made, and how it came about.

    Attributes:
        head: ``(B, A)`` of the head as stored, (V, r) and (r, d); None where it stands still.
        head_delta: Their product, float32, (V, d).
        pairs: Hub name to ``(B, A)`` as stored, for every other matrix that was trained.
        search: The scale search on top of what was there before.
        record: Facts for run.json.
    """

    head: Pair | None
    head_delta: Tensor | None
    pairs: Mapping[str, Pair]
    search: ScaleDecision
    record: Mapping[str, object]


def facts_of_stage(
    given: StageInput,
    schedule: TrainingSchedule,
    placement: Placement,
    job: TrainingJob,
    run: TrainingReport,
    start_pairs: int,
) -> Mapping[str, object]:
    """How a stage went that began with so many pairs, for run.json."""
    common, width = len(job.student_ids), given.pair.student.architecture.head_slot.shape[1]
    if schedule.stage == "calibrated":
        own = as_json(_of_fit(given, schedule, run, places=len(job.text.position)))
    else:
        trained = _of_training(schedule, placement, run)
        own = as_json(replace(trained, trained_on_tokens=int(job.text.ids.size), start_pairs=start_pairs))
    return own | {
        "common_tokens": common,
        "copies_of_the_text": schedule.extra.copies,
        "own_text_sequences": schedule.extra.generated,
        "full_rank": min(common, width),
    }


def _of_fit(given: StageInput, schedule: TrainingSchedule, run: TrainingReport, places: int) -> FitRecord:
    outcome, settings = run.outcome, run.settings
    last, halved = schedule.layers - schedule.first, 2**outcome.halvings
    return FitRecord(
        fitted_on_places=places,
        copies_reason="" if given.fit_text.identical else "the tokenizers differ, so tokens cannot be exchanged",
        kl_by_pass=tuple(point.kl for point in outcome.curve),
        best_pass=outcome.best,
        ended=outcome.ended,
        halvings=outcome.halvings,
        passes_resumed=outcome.resumed_at * settings.checks // outcome.steps,
        passes_rejected=tuple(outcome.rejected),
        step_size=settings.head_rate / halved,
        last_layers=last,
        last_layers_reason="" if given.start is None else "the weights stage has changed every layer already",
        last_layers_step_size=settings.rate / halved if last else None,
        last_layers_matrices=len(schedule.ranks),
    )


def _of_training(schedule: TrainingSchedule, placement: Placement, run: TrainingReport) -> TrainingRecord:
    outcome, choice = run.outcome, run.choice
    return TrainingRecord(
        curve=tuple(outcome.curve),
        best=outcome.best,
        steps=outcome.steps,
        ended=outcome.ended,
        training_seconds=round(outcome.seconds, 2),
        resumed_at_step=outcome.resumed_at,
        bytes_read=run.bytes_read,
        seconds_reading=round(run.seconds_reading, 2),
        seconds_waiting=round(run.seconds_waiting, 2),
        peak_anonymous_bytes=run.peak_anonymous_bytes,
        peak_device_bytes=run.peak_device_bytes,
        saves_rejected=tuple(outcome.rejected),
        settings=run.settings,
        rate_trials=choice.trials if choice else (),
        rate_tried_from_start=bool(choice and choice.from_start),
        placement=placement,
        matrices=len(schedule.ranks),
        head="fixed" if run.settings.head == "fixed" else "trained",
    )
