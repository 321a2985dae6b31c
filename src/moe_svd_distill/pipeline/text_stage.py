"""A stage on text: an adapter trained on the teacher's distributions, its head's rank and its scale chosen.

The calibrated stage trains the head and the last layers on what goes into them, the refined stage all layers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.files.names import CURVE_FILE
from moe_svd_distill.files.writing import write_json
from moe_svd_distill.pipeline.head_change import MovingHead
from moe_svd_distill.pipeline.placement import place_training, threads_of_a_run
from moe_svd_distill.pipeline.schedule import TrainingSchedule
from moe_svd_distill.pipeline.stage import StageInput, StageResult
from moe_svd_distill.pipeline.stage_text import Passes, Report, search_text, stage_texts, student_head
from moe_svd_distill.pipeline.training_start import Start, read_start
from moe_svd_distill.pipeline.units import digest_of, library_versions
from moe_svd_distill.streaming import PassSettings, load_head
from moe_svd_distill.training.fixed_head import ExpectedText, FixedHead, with_teacher_expectations
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.job import StudentInTraining, TrainingJob, TrainingReport, threads
from moe_svd_distill.training.measuring import predicting_places
from moe_svd_distill.training.processes import run_training
from moe_svd_distill.training.progress import Progress
from moe_svd_distill.training.text import TrainingText

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.evaluation.scale_search import ScaleSearch

ALGORITHM = 7  # raise whenever the same input would give another adapter


def distil_on_text(
    given: StageInput, schedule: TrainingSchedule, report: Report, note: Callable[[str], None]
) -> StageResult:
    """Train the student's pairs and its head, choose the head's rank and the scale of it all.

    Args:
        given: What to work with.
        schedule: How.
        report: Told the name of a step and the fraction done.
        note: Told where training stands, in words, each time it is measured.

    Raises:
        DistillError: One of its kinds.
    """
    cache = given.recipe.cache or given.recipe.output / "cache"
    adapter = given.start if schedule.keeps_start else None
    reading = Passes(given.pair, PassSettings(given.devices), cache, adapter, report)
    with threads(threads_of_a_run()), reading as passes:
        return _TextStage(given, schedule, passes, report, note).run()


class _TextStage:
    def __init__(
        self, given: StageInput, schedule: TrainingSchedule, passes: Passes, report: Report, note: Callable[[str], None]
    ) -> None:
        self.given, self.schedule, self.passes, self.report, self.note = given, schedule, passes, report, note
        self.recipe, self.pair, self.fit_text = given.recipe, given.pair, given.fit_text
        recipe, pair, trained = given.recipe, given.pair, schedule.trained
        self.placement = place_training(recipe, pair, given.devices, given.workers, trained)
        fitting = "fitting the head" if schedule.beginning.leaves_head_alone else "fitting the head and the last layers"
        self.step = fitting if schedule.stage == "calibrated" else "training"
        self.points = self.halvings = 0

    def run(self) -> StageResult:
        begin, schedule = time.monotonic(), self.schedule
        start = read_start(self.given, schedule)
        job = self.job(start)
        self.report("preparing the student, and what the loss needs of the teacher", None)
        with run_training(job, self.on_progress) as (trainee, run):
            self.report("measuring the trained student", None)
            moving = None
            if isinstance(trainee.head, TrainedHead):
                origin = start.head if schedule.keeps_start else None
                moving = MovingHead(self.given, trainee, trainee.head, run.outcome.curve[0].kl, origin)
            search = self.search_scale(trainee, moving)
            scale = float(search.scales[schedule.stage])
            pairs = {name: self.stored_pair(trainee, name, scale) for name in trainee.bank.names}
            change = moving.change(scale) if moving else None
        pairs |= {name: (scale * left, right) for name, (left, right) in start.carried.items()}
        choice = moving.choice if moving else None
        facts = self.facts_of_fit if schedule.stage == "calibrated" else self.facts_of_training
        record = facts(job, run, start) | {"scale": scale} | (asdict(choice) if choice else {})
        record |= {
            "common_tokens": len(job.student_ids),
            "copies_of_the_text": schedule.extra.copies,
            "own_text_sequences": schedule.extra.generated,
            "full_rank": min(len(job.student_ids), self.pair.student.architecture.head_slot.shape[1]),
            "streamed": self.passes.facts,
            "seconds": round(time.monotonic() - begin, 2),
        }
        return StageResult(change, pairs, search, record)

    def on_progress(self, progress: Progress, steps: int) -> None:
        """Pass on where training stands; of a training of all layers the output folder holds its curve."""
        if not self.points and progress.step > 1:
            self.note(f"{self.step}: resuming from step {progress.step - 1:,} of {steps:,}")
        self.report(self.step, progress.step / steps)
        if progress.halvings > self.halvings:
            self.halvings = progress.halvings
            self.note(
                f"{self.step}: the first check was no better than the untrained student; begins anew at half the rate"
            )
        if len(progress.curve) == self.points:
            return
        self.points = len(progress.curve)
        if self.schedule.stage == "refined":
            curve = [asdict(point) for point in progress.curve]
            write_json(self.recipe.output / CURVE_FILE, {"steps": steps, "curve": curve})
        last = progress.curve[-1]
        if last.loss is not None:
            self.note(
                f"{self.step}: step {last.step:,} of {steps:,}, loss {last.loss:.4f}, KL on other text {last.kl:.4f} "
                f"({progress.curve[0].kl:.4f} before)"
            )

    def job(self, start: Start) -> TrainingJob:
        """Let the models read the text, and write down what every process needs to know."""
        fit, schedule, placement = self.fit_text, self.schedule, self.placement
        head = student_head(self.pair, self.given.start if schedule.keeps_start else None, fit.student_ids, "cpu")
        beginning, seed = schedule.beginning, self.recipe.seed
        text, check = stage_texts(self.given.text, schedule.extra, beginning, self.passes, head, seed)
        identity = {
            "algorithm": ALGORITHM,
            "versions": library_versions(),
            "settings": asdict(schedule.settings),
            "start": start.path.name,
            "passes": {name: facts["key"] for name, facts in self.passes.facts.items()},
            "models": self.pair.cache_keys(),
            "text": digest_of(text.ids, text.position, text.teacher_position, text.following, check.position),
            "tokens": digest_of(fit.student_ids, fit.teacher_ids),
            "first": beginning.layer,
            "ranks": sorted(schedule.trained.ranks.items()),
            "placement": asdict(placement),
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return TrainingJob(
            teacher=self.pair.teacher.checkpoint,
            student=self.pair.student.checkpoint,
            teacher_ids=fit.teacher_ids,
            student_ids=fit.student_ids,
            text=text,
            check=check,
            first=beginning.layer,
            ranks=schedule.trained.ranks,
            start=start.path,
            settings=schedule.settings,
            tried=schedule.tries_rates,
            resident=placement.resident,
            dtype=placement.torch_dtype,
            devices=placement.devices,
            threads=placement.threads,
            folder=self.given.folder,
            key=key,
            save_seconds=self.recipe.training.save_seconds,
        )

    def stored_pair(self, trainee: StudentInTraining, name: str, scale: float) -> tuple[Tensor, Tensor]:
        """``(B, A)`` of a matrix as stored, with zeros up to the rank that was asked for, so that all are alike."""
        left, right = trainee.pair(name)
        lacking, dtype = self.schedule.trained.ranks[name] - len(right), getattr(torch, self.recipe.dtype)
        left = torch.nn.functional.pad(scale * left, (0, lacking))
        return left.to("cpu", dtype), torch.nn.functional.pad(right, (0, 0, 0, lacking)).to("cpu", dtype)

    def search_scale(self, trainee: StudentInTraining, moving: MovingHead | None) -> ScaleSearch:
        """How much of it all to keep; nothing is a valid answer."""
        from moe_svd_distill.evaluation.scale_search import search_scale

        schedule, places = self.schedule, predicting_places(self.given.text.search)
        dtype = self.placement.torch_dtype
        text = search_text(self.given.text, schedule.beginning, self.passes).open(dtype)
        head = trainee.head
        still = self.expected(head, text) if isinstance(head, FixedHead) else nullcontext()
        with still as expected:
            self.report("searching the scale of what was trained", None)

            def at(scales: Mapping[str, float]) -> Measurement:
                scale = scales[schedule.stage]
                if moving is not None:
                    return moving.figures(scale, text, places)
                assert isinstance(head, FixedHead)
                assert expected is not None
                states, target = trainee.states_of(text, scale), torch.from_numpy(places.target)
                columns = head.figures(states, expected.text.teacher, expected.best, target)
                return Measurement.of_tokens(columns.double().numpy(), places.unit)

            return search_scale(at, (schedule.stage,), global_scales=schedule.scales)

    def expected(self, head: FixedHead, text: TrainingText) -> AbstractContextManager[ExpectedText]:
        """What the scale search needs of the teacher for a head that stands still."""
        self.report("working out what the scale search needs of the teacher", None)
        checkpoint, tokens = self.pair.teacher.checkpoint, self.fit_text.teacher_ids
        teacher = load_head(checkpoint, self.given.devices[0], torch.float32, tokens=tokens)
        return with_teacher_expectations(
            text, teacher, head.weights, 0.0, self.given.folder, "search", head.products.dtype
        )

    def facts_of_fit(self, job: TrainingJob, run: TrainingReport, start: Start) -> dict[str, Any]:
        """For run.json, of the calibrated stage."""
        outcome, settings, beginning = run.outcome, run.settings, self.schedule.beginning
        last, halved = beginning.layers - beginning.layer, 2**outcome.halvings
        return {
            "fitted_on_places": len(job.text.position),
            "copies_reason": "" if self.fit_text.identical else "the tokenizers differ, so tokens cannot be exchanged",
            "kl_by_pass": [point.kl for point in outcome.curve],
            "best_pass": outcome.best,
            "ended": outcome.ended,
            "halvings": outcome.halvings,
            "passes_resumed": outcome.resumed_at * settings.checks // outcome.steps,
            "passes_rejected": list(outcome.rejected),
            "step_size": settings.head_rate / halved,
            "last_layers": last,
            "last_layers_reason": ""
            if self.given.start is None
            else "the weights stage has changed every layer already",
            "last_layers_step_size": settings.rate / halved if last else None,
            "last_layers_matrices": len(self.schedule.trained.ranks),
        }

    def facts_of_training(self, job: TrainingJob, run: TrainingReport, start: Start) -> dict[str, Any]:
        """For run.json, of the refined stage."""
        outcome = run.outcome
        return {
            "trained_on_tokens": int(job.text.ids.size),
            "start_pairs": len(start.names),
            "curve": [asdict(point) for point in outcome.curve],
            "best": outcome.best,
            "steps": outcome.steps,
            "ended": outcome.ended,
            "training_seconds": round(outcome.seconds, 2),
            "resumed_at_step": outcome.resumed_at,
            "bytes_read": run.bytes_read,
            "seconds_reading": round(run.seconds_reading, 2),
            "seconds_waiting": round(run.seconds_waiting, 2),
            "peak_anonymous_bytes": run.peak_anonymous_bytes,
            "peak_device_bytes": run.peak_device_bytes,
            "saves_rejected": list(outcome.rejected),
            "settings": asdict(run.settings),
            "rate_trials": [asdict(trial) for trial in run.choice.trials] if run.choice else [],
            "rate_tried_from_start": bool(run.choice and run.choice.from_start),
            "placement": self.placement.as_dict(),
            "matrices": len(self.schedule.trained.ranks),
            "head": "fixed" if run.settings.head == "fixed" else "trained",
        }
