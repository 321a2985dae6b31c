"""The calibrated stage: one streamed pass of each model over a little text, and the head fitted to what they say."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_svd_distill.fitting.check import figures_by_document, predicting_places
from moe_svd_distill.fitting.copies import default_copies, perturbed_copies
from moe_svd_distill.fitting.head import HeadFit, HeadFitSettings, fit_head
from moe_svd_distill.fitting.pairs import HeadWeights, Segment, StatePairs, common_rows
from moe_svd_distill.fitting.rank import RankChoice, choose_rank, head_factors
from moe_svd_distill.pipeline.preparation import library_versions
from moe_svd_distill.streaming import PassSettings, StreamedStates, load_head, stream_states

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from moe_svd_distill.evaluation.scale_search import ScaleSearch
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.texts import RunText
    from moe_svd_distill.recipe import Recipe

ALGORITHM = 1  # raise whenever the same input would give another head
Report = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Body:
    """The adapter of the weights stage, which the head is fitted on top of.

    Attributes:
        folder: The adapter at scale 1.
        scales: Its scales by group; the head's belongs to the start of the fit.
    """

    folder: Path
    scales: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class CalibratedHead:
    """The fitted head and how it came about.

    Attributes:
        factors: ``(B, A)`` as stored, (V, r) and (r, d).
        delta: Their product, float32, (V, d).
        search: The scale search on top of what was there before.
        record: Facts for run.json.
    """

    factors: tuple[Tensor, Tensor]
    delta: Tensor
    search: ScaleSearch
    record: dict[str, Any]


def calibrate(
    recipe: Recipe,
    pair: ModelPair,
    text: RunText,
    folder: Path,
    devices: tuple[str, ...],
    body: Body | None,
    report: Report,
) -> CalibratedHead:
    """Stream both models over the text, fit the head, choose its rank and its scale.

    Args:
        recipe: What is asked for.
        pair: Teacher and student.
        text: From ``read_run_text``, with a part to fit on.
        folder: The output's folder for parts, where the fit keeps its state after each pass.
        devices: Where to compute; the fit runs on the first.
        body: The adapter of the weights stage, if there is one.
        report: Told the name of a step and the fraction done.

    Raises:
        DistillError: One of its kinds.
    """
    with ExitStack() as stack:
        return _Calibration(recipe, pair, text, folder, devices, body, report, stack).run()


class _Calibration:
    def __init__(
        self,
        recipe: Recipe,
        pair: ModelPair,
        text: RunText,
        folder: Path,
        devices: tuple[str, ...],
        body: Body | None,
        report: Report,
        stack: ExitStack,
    ) -> None:
        assert text.fit is not None
        self.recipe, self.pair, self.body, self.report, self.stack = recipe, pair, body, report, stack
        self.fit_text, self.search_text = text.fit, text.search
        self.folder, self.device = folder, torch.device(devices[0])
        self.cache = recipe.cache or recipe.output / "cache"
        self.settings = PassSettings(devices)
        self.dtype: torch.dtype = getattr(torch, recipe.dtype)
        self.passes: dict[str, Any] = {}

    def run(self) -> CalibratedHead:
        begin = time.monotonic()
        self.load_heads()
        fit, check = self.state_pairs()
        fitted = self.fit(fit, check)
        choice = choose_rank(
            fitted.delta,
            fitted.metric,
            self.recipe.head_rank,
            check,
            self.student,
            self.teacher,
            fitted.kl[0],
            self.dtype,
        )
        self.report("searching the head's scale", None)
        search, scale = self.search_scale(fitted, choice.rank)
        factors = self.factors(fitted, choice.rank, scale)
        product = factors[0].float() @ factors[1].float()
        whole = torch.zeros_like(self.student_head.weight)
        whole[self.student_ids] = product
        left = torch.zeros(len(whole), factors[0].shape[1], dtype=self.dtype)
        left[self.student_ids.cpu()] = factors[0].cpu()
        record = self.facts(fit, fitted, choice, scale) | {"seconds": round(time.monotonic() - begin, 2)}
        return CalibratedHead((left, factors[1].cpu()), whole.cpu(), search, record)

    def load_heads(self) -> None:
        device = str(self.device)
        self.student_head = load_head(self.pair.student.checkpoint, device, torch.float32)
        teacher = load_head(self.pair.teacher.checkpoint, device, torch.float32)
        self.student_ids = torch.from_numpy(self.fit_text.student_ids).to(self.device)
        self.student = common_rows(self.student_head, self.fit_text.student_ids)
        self.teacher = common_rows(teacher, self.fit_text.teacher_ids)
        self.start: Tensor | None = None
        if self.body is not None and any(self.body.scales.values()):
            changed = load_head(
                self.pair.student.checkpoint,
                device,
                torch.float32,
                adapter=self.body.folder,
                scales=dict(self.body.scales),
            )
            self.start = changed.weight[self.student_ids] - self.student.weight

    def state_pairs(self) -> tuple[StatePairs, StatePairs]:
        """Stream the student, draw the copies from what it expects, stream the teacher, and the student once more."""
        fit, search = self.fit_text, self.search_text
        places = predicting_places(search)
        count = len(fit.student.sequences)
        mine = self.stream("student", np.concatenate([fit.student.sequences, search.student.sequences]))
        asked = default_copies(fit.student.tokens) if self.recipe.copies == "auto" else self.recipe.copies
        self.copies = asked if fit.identical else 0
        self.report("drawing copies of the text", None)
        copied = perturbed_copies(fit.student.sequences, mine, self.with_start(), self.copies, self.recipe.seed)
        theirs = self.stream("teacher", np.concatenate([fit.teacher.sequences, search.teacher.sequences, copied]))
        flat_mine, flat_theirs = mine.rows(slice(None)).flatten(0, 1), theirs.rows(slice(None)).flatten(0, 1)
        segments = [Segment(flat_mine, flat_theirs, fit.student_position, fit.teacher_position)]
        if self.copies:
            again = self.stream("student, copies", copied)
            everywhere = np.arange(copied.size)
            offset = (count + len(search.teacher.sequences)) * fit.teacher.length
            segments.append(
                Segment(again.rows(slice(None)).flatten(0, 1), flat_theirs, everywhere, everywhere + offset)
            )
        self.places = places
        check = Segment(
            flat_mine,
            flat_theirs,
            places.student_position + count * fit.student.length,
            places.teacher_position + len(fit.teacher.sequences) * fit.teacher.length,
        )
        self.check_pairs = StatePairs([check])
        return StatePairs(segments), self.check_pairs

    def stream(self, name: str, sequences: NDArray[np.int64]) -> StreamedStates:
        student = name.startswith("student")
        checkpoint = self.pair.student.checkpoint if student else self.pair.teacher.checkpoint
        body = self.body if student else None
        states = stream_states(
            checkpoint,
            sequences,
            self.cache,
            self.settings,
            adapter=None if body is None else body.folder,
            scales=1.0 if body is None else dict(body.scales),
            on_progress=lambda done, layers: self.report(f"reading the text: {name}", done / layers),
        )
        self.stack.enter_context(states)
        self.passes[name] = {
            key: value for key, value in asdict(states.record).items() if key not in ("unused", "rejected")
        } | {"tokens": int(sequences.size), "file": states.path.name}
        return states

    def with_start(self) -> HeadWeights:
        if self.start is None:
            return self.student
        return HeadWeights(self.student.weight + self.start, self.student.bias, self.student.transform)

    def fit(self, fit: StatePairs, check: StatePairs) -> HeadFit:
        settings = HeadFitSettings(passes=self.recipe.head_passes, seed=self.recipe.seed)
        identity = {
            "algorithm": ALGORITHM,
            "versions": library_versions(),
            "settings": asdict(settings),
            "passes": {name: facts["key"] for name, facts in self.passes.items()},
            "models": [self.pair.teacher.checkpoint.fingerprint(), self.pair.student.checkpoint.fingerprint()],
            "tokens": hashlib.sha256(
                self.fit_text.student_ids.tobytes() + self.fit_text.teacher_ids.tobytes()
            ).hexdigest(),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        step = "fitting the head"
        return fit_head(
            fit,
            check,
            self.student,
            self.teacher,
            settings,
            self.folder,
            key,
            start=self.start,
            on_progress=lambda fraction: self.report(step, fraction),
        )

    def search_scale(self, fitted: HeadFit, rank: int) -> tuple[ScaleSearch, float]:
        """How far to go from what was there before to the fitted head; nothing is a valid answer."""
        from moe_svd_distill.evaluation.figures import Measurement
        from moe_svd_distill.evaluation.scale_search import search_scale

        check = self.check_pairs

        def at(scales: Mapping[str, float]) -> Measurement:
            left, right = self.factors(fitted, rank, scales["head"])
            head = HeadWeights(
                self.student.weight + left.float() @ right.float(), self.student.bias, self.student.transform
            )
            sums = figures_by_document(check, self.places, head, self.teacher)
            return Measurement(sums.kl, sums.cross_entropy, sums.agreement, sums.tokens)

        found = search_scale(at, ("head",))
        return found, float(found.scales["head"])

    def factors(self, fitted: HeadFit, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """``(B, A)`` over the common tokens, as stored, at a point between the start and the fitted head."""
        if self.start is None:
            left, right = head_factors(fitted.delta, fitted.metric, rank, torch.float32)
            return (left * scale).to(self.dtype), right.to(self.dtype)
        delta = self.start + scale * (fitted.delta - self.start)
        return head_factors(delta, fitted.metric, rank, self.dtype)

    def facts(self, fit: StatePairs, fitted: HeadFit, choice: RankChoice, scale: float) -> dict[str, Any]:
        return {
            "fitted_on_places": len(fit),
            "copies_of_the_text": self.copies,
            "copies_reason": "" if self.fit_text.identical else "the tokenizers differ, so tokens cannot be exchanged",
            "common_tokens": len(self.student_ids),
            "kl_by_pass": list(fitted.kl),
            "best_pass": fitted.best,
            "passes_resumed": fitted.resumed,
            "step_size": fitted.rate,
            "scale": scale,
            **asdict(choice),
            "full_rank": min(fitted.delta.shape),
            "streamed": self.passes,
        }
