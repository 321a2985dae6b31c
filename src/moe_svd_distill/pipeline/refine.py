"""The refined stage: the factors of an adapter trained on the teacher's distributions, from a start or from zero."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.files.names import CURVE_FILE
from moe_svd_distill.files.writing import write_json
from moe_svd_distill.fitting.check import predicting_places
from moe_svd_distill.pipeline.fitted import Fitted
from moe_svd_distill.pipeline.moving_head import MovingHead
from moe_svd_distill.pipeline.placement import Placement, place_training
from moe_svd_distill.pipeline.schedule import TextSize, schedule_training
from moe_svd_distill.pipeline.states import Body, Report
from moe_svd_distill.pipeline.training_start import Start, read_start
from moe_svd_distill.pipeline.training_text import search_text, training_texts
from moe_svd_distill.pipeline.units import digest_of, library_versions
from moe_svd_distill.streaming import PassSettings, StreamedStates, load_head, stream_states
from moe_svd_distill.training.crew import trained
from moe_svd_distill.training.expected_rows import ExpectedText, with_expected_rows
from moe_svd_distill.training.fixed_head import FixedHead
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.job import Trained, Trainee, TrainingJob
from moe_svd_distill.training.loop import Progress
from moe_svd_distill.training.text import TrainingText

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from moe_svd_distill.evaluation.scale_search import ScaleSearch
    from moe_svd_distill.fitting.rank import RankChoice
    from moe_svd_distill.pipeline.pair import Model, ModelPair
    from moe_svd_distill.pipeline.texts import RunText
    from moe_svd_distill.recipe import Recipe

GROUP = "refined"
ALGORITHM = 6  # raise whenever the same input would give another adapter
_STEP = "training"


@dataclass(frozen=True, eq=False)
class Given:
    """What the refined stage works with.

    Attributes:
        recipe: What is asked for.
        pair: Teacher and student.
        stages: Of the run.
        text: From ``read_run_text``, with a part to train on.
        folder: The output's folder for parts, where training is saved.
        devices: Where to compute.
        workers: Processes to use on the CPU.
        start: The adapter to begin with; None for none.
    """

    recipe: Recipe
    pair: ModelPair
    stages: tuple[str, ...]
    text: RunText
    folder: Path
    devices: tuple[str, ...]
    workers: int
    start: Body | None


def refine(given: Given, report: Report, note: Callable[[str], None]) -> Fitted:
    """Train the student's pairs and its head, choose the head's rank and the scale of it all.

    Args:
        given: What to work with.
        report: Told the name of a step and the fraction done.
        note: Told where training stands, in words, each time it is measured.

    Raises:
        DistillError: One of its kinds.
    """
    with ExitStack() as stack:
        return _Refinement(given, report, note, stack).run()


class _Refinement:
    def __init__(self, given: Given, report: Report, note: Callable[[str], None], stack: ExitStack) -> None:
        recipe, pair, text = given.recipe, given.pair, given.text
        assert text.fit is not None
        self.recipe, self.pair, self.text, self.fit_text = recipe, pair, text, text.fit
        self.folder, self.begin_with, self.report, self.stack = given.folder, given.start, report, stack
        self.note, self.points = note, 0
        self.cache = recipe.cache or recipe.output / "cache"
        self.pass_settings = PassSettings(given.devices)
        self.device = torch.device(given.devices[0])
        self.dtype: torch.dtype = getattr(torch, recipe.dtype)
        self.passes: dict[str, Any] = {}
        self.schedule = schedule_training(recipe, pair.student, given.stages, TextSize.of(text), given.devices[0])
        trained = self.schedule.trained
        self.ranks = trained.ranks
        self.placement: Placement = place_training(recipe, pair, given.devices, given.workers, trained)

    def run(self) -> Fitted:
        begin = time.monotonic()
        start = read_start(self.pair, self.begin_with, self.ranks, self.fit_text.student_ids, self.folder)
        job = self.job(start)
        self.report("preparing the student, and what the loss needs of the teacher", None)
        with trained(job, self.told) as (trainee, run):
            self.report("measuring the trained student", None)
            head = trainee.head
            moving = (
                MovingHead(self.recipe, self.pair, self.fit_text.student_ids, trainee, head, run.outcome.curve[0].kl)
                if isinstance(head, TrainedHead)
                else None
            )
            searched = search_text(self.pair, self.text, self.read).open()
            search = self.search_scale(trainee, moving, searched)
            scale = float(search.scales[GROUP])
            pairs = {name: self.stored_pair(trainee, name, scale) for name in trainee.bank.names}
            change = moving.change(scale) if moving else None
        pairs |= {name: (scale * left, right) for name, (left, right) in start.carried.items()}
        record = self.facts(job, run, moving.choice if moving else None, scale, start)
        return Fitted(change, pairs, search, record | {"seconds": round(time.monotonic() - begin, 2)})

    def told(self, progress: Progress, steps: int) -> None:
        """Pass on where training stands, and keep its curve in the output folder."""
        self.report(_STEP, progress.step / steps)
        if len(progress.curve) == self.points:
            return
        self.points = len(progress.curve)
        curve = [asdict(point) for point in progress.curve]
        write_json(self.recipe.output / CURVE_FILE, {"steps": steps, "curve": curve})
        last = progress.curve[-1]
        if last.loss is not None:
            self.note(
                f"training: step {last.step:,} of {steps:,}, loss {last.loss:.4f}, KL on other text {last.kl:.4f} "
                f"({progress.curve[0].kl:.4f} before)"
            )

    def job(self, start: Start) -> TrainingJob:
        """Read the text by the teacher, and write down what every process needs to know."""
        fit = self.fit_text
        text, check = training_texts(self.recipe, self.pair, self.text, self.schedule.copying, self.read)
        settings = self.schedule.settings
        identity = {
            "algorithm": ALGORITHM,
            "versions": library_versions(),
            "settings": asdict(settings),
            "start": start.path.name,
            "passes": {name: facts["key"] for name, facts in self.passes.items()},
            "models": [self.pair.teacher.checkpoint.fingerprint(), self.pair.student.checkpoint.fingerprint()],
            "text": digest_of(text.ids, text.position, text.teacher_position, text.following, check.position),
            "tokens": digest_of(fit.student_ids, fit.teacher_ids),
            "ranks": sorted(self.ranks.items()),
            "placement": asdict(self.placement),
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return TrainingJob(
            self.pair.teacher.checkpoint,
            self.pair.student.checkpoint,
            fit.teacher_ids,
            fit.student_ids,
            text,
            check,
            self.ranks,
            start.path,
            settings,
            self.schedule.tries_rates,
            self.placement.resident,
            self.placement.torch_dtype,
            self.placement.devices,
            self.placement.threads,
            self.folder,
            key,
            self.recipe.training.save_seconds,
        )

    def stored_pair(self, trainee: Trainee, name: str, scale: float) -> tuple[Tensor, Tensor]:
        """``(B, A)`` of a matrix as stored, with zeros up to the rank that was asked for, so that all are alike."""
        left, right = trainee.pair(name)
        lacking = self.ranks[name] - len(right)
        left = torch.nn.functional.pad(scale * left, (0, lacking))
        return left.to("cpu", self.dtype), torch.nn.functional.pad(right, (0, 0, 0, lacking)).to("cpu", self.dtype)

    def search_scale(self, trainee: Trainee, moving: MovingHead | None, text: TrainingText) -> ScaleSearch:
        """How much of it all to keep; nothing is a valid answer."""
        from moe_svd_distill.evaluation.scale_search import search_scale

        places = predicting_places(self.text.search)
        with ExitStack() as stack:
            head = trainee.head
            standing = stack.enter_context(self.standing_head(head, text)) if isinstance(head, FixedHead) else None
            self.report("searching the scale of the trained adapter", None)

            def at(scales: Mapping[str, float]) -> Measurement:
                scale = scales[GROUP]
                if standing is None:
                    assert moving is not None
                    return moving.figures(scale, text, places)
                assert isinstance(head, FixedHead)
                states, target = trainee.states_of(text, scale), torch.from_numpy(places.target)
                columns = head.figures(states, standing.text.teacher, standing.best, target)
                return Measurement.of_tokens(columns.double().numpy(), places.unit)

            return search_scale(at, (GROUP,), global_scales=(0.25, 0.5, 1.0))

    def standing_head(self, head: FixedHead, text: TrainingText) -> AbstractContextManager[ExpectedText]:
        """What the scale search needs of the teacher for a head that stands still."""
        self.report("working out what the scale search needs of the teacher", None)
        checkpoint, tokens = self.pair.teacher.checkpoint, self.fit_text.teacher_ids
        teacher = load_head(checkpoint, str(self.device), torch.float32, tokens=tokens)
        return with_expected_rows(text, teacher, head.weights, 0.0, self.folder, "search", head.products.dtype)

    def facts(
        self,
        job: TrainingJob,
        run: Trained,
        choice: RankChoice | None,
        scale: float,
        start: Start,
    ) -> dict[str, Any]:
        outcome = run.outcome
        return {
            "trained_on_tokens": int(job.text.ids.size),
            "copies_of_the_text": self.schedule.copying.copies,
            "own_text_sequences": self.schedule.copying.own,
            "common_tokens": len(self.fit_text.student_ids),
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
            "matrices": len(self.ranks),
            "scale": scale,
            "head": "fixed" if choice is None else "trained",
            **(asdict(choice) if choice else {}),
            "full_rank": min(len(job.student_ids), self.pair.student.architecture.head_slot.shape[1]),
            "streamed": self.passes,
        }

    def read(self, name: str, model: Model, sequences: NDArray[np.int64]) -> StreamedStates:
        """A pass of one of the models over the text."""
        states = stream_states(
            model.checkpoint,
            sequences,
            self.cache,
            self.pass_settings,
            on_progress=lambda done, layers: self.report(f"reading the text: {name}", done / layers),
        )
        self.stack.enter_context(states)
        facts = {key: value for key, value in asdict(states.record).items() if key != "unused"}
        self.passes[name] = facts | {"file": states.path.name}
        return states
