"""A stage on text: an adapter trained on the teacher's distributions, its head's rank and its scale chosen.

The calibrated stage trains the head and the last layers on what goes into them, the refined stage all layers.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from moe_svd_distill.execution.events import Listener, Measured, Noted, StageReached
from moe_svd_distill.files.names import CACHE_FOLDER, CURVE_FILE
from moe_svd_distill.files.writing import write_json
from moe_svd_distill.pipeline.assembly import asked_head_rank
from moe_svd_distill.pipeline.placement import place_training, threads_of_a_run
from moe_svd_distill.pipeline.scale import decide_trained_scale
from moe_svd_distill.pipeline.schedule import TrainingSchedule
from moe_svd_distill.pipeline.stage import StageInput, StageResult, facts_of_stage
from moe_svd_distill.pipeline.stage_text import Passes, Report, search_text, stage_texts, student_head
from moe_svd_distill.pipeline.tracked_figures import point_figures
from moe_svd_distill.pipeline.training_start import Start, read_start
from moe_svd_distill.pipeline.units import digest_of, library_versions
from moe_svd_distill.streaming import PassSettings
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.head_rank import MovingHead
from moe_svd_distill.training.job import StudentInTraining, TrainingJob, threads
from moe_svd_distill.training.lora_pairs import with_rank
from moe_svd_distill.training.processes import run_training
from moe_svd_distill.training.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor


ALGORITHM = 7  # raise whenever the same input would give another adapter


def distil_on_text(given: StageInput, schedule: TrainingSchedule, tell: Listener) -> StageResult:
    """Train the student's pairs and its head, choose the head's rank and the scale of it all.

    Args:
        given: What to work with.
        schedule: How.
        tell: Told the steps, and where training stands each time it is measured.

    Raises:
        DistillError: One of its kinds.
    """
    cache = given.recipe.cache or given.recipe.output / CACHE_FOLDER
    adapter = given.start if schedule.keeps_start else None

    def report(name: str, fraction: float | None) -> None:
        tell(StageReached(name, fraction))

    reading = Passes(given.pair, PassSettings(given.settings.devices), cache, adapter, report)
    with threads(threads_of_a_run()), reading as passes:
        return _TextStage(given, schedule, passes, report, tell).run()


class _TextStage:
    def __init__(
        self, given: StageInput, schedule: TrainingSchedule, passes: Passes, report: Report, tell: Listener
    ) -> None:
        self.given, self.schedule, self.passes, self.report, self.tell = given, schedule, passes, report, tell
        self.recipe, self.pair, self.fit_text = given.recipe, given.pair, given.fit_text
        self.architecture = given.pair.student.architecture
        self.placement = place_training(given.recipe, given.pair, given.settings, schedule)
        fitting = "fitting the head" if schedule.head_alone else "fitting the head and the last layers"
        self.step = fitting if schedule.stage == "calibrated" else "training"
        self.points = self.halvings = 0

    def run(self) -> StageResult:
        begin, given, schedule = time.monotonic(), self.given, self.schedule
        start = read_start(given, schedule)
        job = self.job(start)
        self.report("preparing the student, and what the loss needs of the teacher", None)
        with run_training(job, self.on_progress) as (trainee, run):
            self.report("measuring the trained student", None)
            moving = None
            if isinstance(trainee.head, TrainedHead):
                origin = start.head if schedule.keeps_start else None
                asked, dtype = asked_head_rank(self.recipe, self.architecture.head), getattr(torch, self.recipe.dtype)
                moving = MovingHead(trainee, trainee.head, asked, run.outcome.curve[0].kl, dtype, origin)
            text = search_text(given.text, schedule, self.passes).open(self.placement.torch_dtype)
            search = decide_trained_scale(given, schedule, text, trainee, moving, self.report)
            scale = float(search.scales[schedule.stage])
            pairs = {name: self.stored_pair(trainee, name, scale) for name in trainee.bank.names}
            head, delta = moving.change(scale, self.architecture.head_slot.shape[0]) if moving else (None, None)
        pairs |= {name: (scale * left, right) for name, (left, right) in start.carried.items()}
        seconds = round(time.monotonic() - begin, 2)
        record = {
            **facts_of_stage(given, schedule, self.placement, job, run, start_pairs=start.pairs),
            **({"rank": moving.rank, "trials": [asdict(trial) for trial in moving.trials]} if moving else {}),
            "scale": scale,
            "streamed": self.passes.facts,
            "seconds": seconds,
        }
        return StageResult(head, delta, pairs, search, record)

    def on_progress(self, progress: Progress) -> None:
        """Pass on where training stands; of a training of all layers the output folder holds its curve."""
        if not self.points and progress.step > 1:
            self.note(f"{self.step}: resuming from step {progress.step - 1:,} of {progress.steps:,}")
        self.report(self.step, progress.step / progress.steps)
        if progress.halvings > self.halvings:
            self.halvings = progress.halvings
            self.note(
                f"{self.step}: the first check was no better than the untrained student; begins anew at half the rate"
            )
        if len(progress.curve) == self.points:
            return
        for point in progress.curve[self.points :]:
            self.tell(Measured(self.schedule.stage, point_figures(point), point.step))
        self.points = len(progress.curve)
        if self.schedule.stage == "refined":
            curve = [asdict(point) for point in progress.curve]
            write_json(self.recipe.output / CURVE_FILE, {"steps": progress.steps, "curve": curve})
        first, last = progress.curve[0], progress.curve[-1]
        if last.loss is not None:
            self.note(
                f"{self.step}: step {last.step:,} of {progress.steps:,}, loss {last.loss:.4f}, "
                f"KL on other text {last.kl:.4f} ({first.kl:.4f} before)"
            )

    def note(self, text: str) -> None:
        """Tell what people should know."""
        self.tell(Noted(text))

    def job(self, start: Start) -> TrainingJob:
        """Let the models read the text, and write down what every process needs to know."""
        fit, schedule, placement = self.fit_text, self.schedule, self.placement
        head = student_head(self.pair, self.given.start if schedule.keeps_start else None, fit.student_ids, "cpu")
        text, check = stage_texts(self.given.text, schedule, self.passes, head)
        identity = {
            "algorithm": ALGORITHM,
            "versions": library_versions(),
            "settings": asdict(schedule.settings),
            "start": start.path.name,
            "passes": {name: facts["key"] for name, facts in self.passes.facts.items()},
            "models": self.pair.cache_keys(),
            "text": digest_of(text.ids, text.position, text.teacher_position, text.following, check.position),
            "tokens": digest_of(fit.student_ids, fit.teacher_ids),
            "first": schedule.first,
            "ranks": sorted(schedule.ranks.items()),
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
            first=schedule.first,
            ranks=schedule.ranks,
            start=start.path,
            settings=schedule.settings,
            tried=schedule.tries_rates,
            placement=placement,
            folder=self.given.folder,
            key=key,
            save_seconds=self.recipe.training.save_seconds,
        )

    def stored_pair(self, trainee: StudentInTraining, name: str, scale: float) -> tuple[Tensor, Tensor]:
        """``(B, A)`` of a matrix as stored, with zeros up to the rank that was asked for, so that all are alike."""
        left, right = with_rank(trainee.bank.pair(name), self.schedule.ranks[name])
        dtype = getattr(torch, self.recipe.dtype)
        return (scale * left).to("cpu", dtype), right.to("cpu", dtype)
