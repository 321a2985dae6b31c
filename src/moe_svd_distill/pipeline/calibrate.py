"""The calibrated stage: streamed passes of both models over a little text, and the head fitted to what they say."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_svd_distill.fitting.check import measure_states
from moe_svd_distill.fitting.head import HeadFit, HeadFitSettings, fit_head
from moe_svd_distill.fitting.last_layers import LayerSource
from moe_svd_distill.fitting.pairs import second_moment
from moe_svd_distill.fitting.rank import RankChoice, choose_rank, head_factors
from moe_svd_distill.fitting.source import StateSource
from moe_svd_distill.pipeline.assembly import asked_head_rank
from moe_svd_distill.pipeline.fitted import Fitted, HeadChange
from moe_svd_distill.pipeline.placement import available_cores, trained_ranks
from moe_svd_distill.pipeline.states import Body, MeasuredText, Report, StateReader
from moe_svd_distill.pipeline.units import digest_of, library_versions
from moe_svd_distill.streaming import Decoder, PassSettings, head_over_common_tokens, load_head

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.algebra.figures import Measurement
    from moe_svd_distill.evaluation.scale_search import ScaleSearch
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.texts import RunText
    from moe_svd_distill.recipe import Recipe
    from moe_svd_distill.streaming import Head

GROUP = "calibrated"
ALGORITHM = 5  # raise whenever the same input would give another head


def calibrate(
    recipe: Recipe,
    pair: ModelPair,
    text: RunText,
    folder: Path,
    devices: tuple[str, ...],
    body: Body | None,
    report: Report,
) -> Fitted:
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
        stack.enter_context(_same_threads())
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
        self.text, self.fit_text = text, text.fit
        self.folder, self.device = folder, torch.device(devices[0])
        self.cache = recipe.cache or recipe.output / "cache"
        self.settings = PassSettings(devices)
        self.dtype: torch.dtype = getattr(torch, recipe.dtype)
        self.ranks: dict[str, int] = {}

    def run(self) -> Fitted:
        begin = time.monotonic()
        self.load_heads()
        source = self.source()
        fitted = self.fit(source)
        choice = choose_rank(
            fitted.delta,
            fitted.metric,
            asked_head_rank(self.recipe, self.pair.student.architecture.head),
            source.check(),
            self.student,
            self.teacher,
            fitted.kl[0],
            self.dtype,
        )
        searched = self.reader.read_search()
        self.report("searching the scale of the fit", None)
        search = self.search_scale(source, fitted, choice.rank, searched)
        scale = float(search.scales[GROUP])
        left, right = self.factors(fitted, choice.rank, scale)
        delta = torch.zeros_like(self.student_head.weight)
        delta[self.student_ids] = left.float() @ right.float()
        whole = torch.zeros(len(delta), left.shape[1], dtype=self.dtype)
        whole[self.student_ids.cpu()] = left.cpu()
        pairs = (
            {name: source.pair(name, rank, scale, self.dtype) for name, rank in self.ranks.items()}
            if isinstance(source, LayerSource)
            else {}
        )
        record = self.facts(source, fitted, choice, scale) | {"seconds": round(time.monotonic() - begin, 2)}
        return Fitted(HeadChange((whole, right.cpu()), delta.cpu()), pairs, search, record)

    def load_heads(self) -> None:
        device = str(self.device)
        self.student_head = load_head(self.pair.student.checkpoint, device, torch.float32)
        self.student_ids = torch.from_numpy(self.fit_text.student_ids).to(self.device)
        self.student = head_over_common_tokens(self.student_head, self.fit_text.student_ids)
        self.teacher = load_head(self.pair.teacher.checkpoint, device, torch.float32, tokens=self.fit_text.teacher_ids)
        self.start: Tensor | None = None
        if self.body is not None and any(self.body.scales.values()):
            changed = load_head(
                self.pair.student.checkpoint,
                device,
                torch.float32,
                tokens=self.fit_text.student_ids,
                adapter=self.body.folder,
                scales=dict(self.body.scales),
            )
            self.start = changed.weight - self.student.weight

    def source(self) -> StateSource | LayerSource:
        """The states to fit on: from files, or through the last layers."""
        layers = self.pair.student.architecture.layers
        self.last = 0 if self.body is not None else min(self.recipe.last_layers, layers)
        self.reader = StateReader(
            self.recipe, self.pair, self.text, self.body, self.settings, self.cache, self.last, self.report, self.stack
        )
        self.states = self.reader.read(self.with_start())
        if not self.last:
            return StateSource(self.states.fit, self.states.check.states, self.device)
        return self.layer_source()

    def layer_source(self) -> LayerSource:
        student = self.pair.student
        check_rows = self.states.check.rows
        assert check_rows is not None
        decoder = Decoder(student.checkpoint, (self.device,), gradients=True)
        decoder.begin_at(check_rows.inputs)
        first, count = check_rows.inputs.layer, student.architecture.layers
        self.ranks = trained_ranks(self.recipe, student, range(first, count))
        states = self.states.fit
        return LayerSource(
            decoder,
            self.states.fit_rows,
            check_rows,
            self.student.weight.shape[1],
            self.ranks,
            lambda device: second_moment(states, device),
            self.device,
            self.recipe.seed,
        )

    def with_start(self) -> Head:
        return self.student if self.start is None else self.student.plus(self.start)

    def fit(self, source: StateSource | LayerSource) -> HeadFit:
        """The fit, or that of an earlier run: it depends on its own text and the checking text, not the search text."""
        check = self.states.check.places
        passes = None if self.recipe.fit_passes == "auto" else self.recipe.fit_passes
        settings = HeadFitSettings(passes, seed=self.recipe.seed)
        identity = {
            "algorithm": ALGORITHM,
            "versions": library_versions(),
            "settings": asdict(settings),
            "passes": {name: facts["key"] for name, facts in self.states.passes.items()},
            "models": [self.pair.teacher.checkpoint.fingerprint(), self.pair.student.checkpoint.fingerprint()],
            "tokens": digest_of(self.fit_text.student_ids, self.fit_text.teacher_ids),
            "places": [
                digest_of(self.fit_text.student_position, self.fit_text.teacher_position),
                digest_of(check.student_position, check.teacher_position),
            ],
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "last_layers": sorted(self.ranks.items()),
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        step = "fitting the head and the last layers" if self.last else "fitting the head"
        return fit_head(
            source,
            self.student,
            self.teacher,
            settings,
            self.folder,
            key,
            start=self.start,
            on_progress=lambda fraction: self.report(step, fraction),
        )

    def search_scale(
        self, source: StateSource | LayerSource, fitted: HeadFit, rank: int, text: MeasuredText
    ) -> ScaleSearch:
        """How far to go from what was there before to the fit; nothing is a valid answer."""
        from moe_svd_distill.evaluation.scale_search import search_scale

        def at(scales: Mapping[str, float]) -> Measurement:
            scale = scales[GROUP]
            head = self.with_start()  # at 0 nothing of the fit is kept: what was there before, at its own rank
            if scale != 0.0:
                left, right = self.factors(fitted, rank, scale)
                head = self.student.plus(left.float() @ right.float())
            states = text.states
            if scale != 0.0 and isinstance(source, LayerSource) and text.rows is not None:
                states = source.states_of(text.rows, scale)
            return measure_states(states, text.places, head, self.teacher)

        return search_scale(at, (GROUP,))

    def factors(self, fitted: HeadFit, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """``(B, A)`` over the common tokens, as stored, at a point between the start and the fitted head."""
        if self.start is None:
            left, right = head_factors(fitted.delta, fitted.metric, rank, torch.float32)
            return (left * scale).to(self.dtype), right.to(self.dtype)
        delta = self.start + scale * (fitted.delta - self.start)
        return head_factors(delta, fitted.metric, rank, self.dtype)

    def facts(
        self, source: StateSource | LayerSource, fitted: HeadFit, choice: RankChoice, scale: float
    ) -> dict[str, Any]:
        return {
            "fitted_on_places": len(self.states.fit),
            "copies_of_the_text": self.states.copying.copies,
            "own_text_sequences": self.states.copying.own,
            "copies_reason": "" if self.fit_text.identical else "the tokenizers differ, so tokens cannot be exchanged",
            "common_tokens": len(self.student_ids),
            "kl_by_pass": list(fitted.kl),
            "best_pass": fitted.best,
            "passes_resumed": fitted.resumed,
            "passes_rejected": list(fitted.rejected),
            "step_size": fitted.rate,
            "last_layers": self.last,
            "last_layers_reason": "" if self.body is None else "the weights stage has changed every layer already",
            "last_layers_step_size": source.rate if isinstance(source, LayerSource) else None,
            "last_layers_matrices": len(self.ranks),
            "scale": scale,
            **asdict(choice),
            "full_rank": min(fitted.delta.shape),
            "streamed": self.reader.passes,
        }


@contextmanager
def _same_threads() -> Iterator[None]:
    """As many threads as the environment says, whatever the process was doing before: sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or available_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
