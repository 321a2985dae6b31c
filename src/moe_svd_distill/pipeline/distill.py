"""Distil: two models and a recipe in, a checked adapter out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.errors import BadDataError, NothingToTransferError
from moe_svd_distill.execution.events import Listener, Noted, StageReached, UnitsPlanned
from moe_svd_distill.execution.publish import OutputFolder
from moe_svd_distill.execution.supervisor import ExecutionSummary, Settings, execute
from moe_svd_distill.files.names import ADAPTER_FILE, CACHE_FOLDER, CARD_FILE, CURVE_FILE, RECORD_FILE
from moe_svd_distill.files.writing import write_text
from moe_svd_distill.pairing.plan import Plan
from moe_svd_distill.pipeline.assembly import AdapterChange, base_model, head_is_whole, stage_adapter, write_head_part
from moe_svd_distill.pipeline.method import Stages, choose_stages, notes_on_sizes
from moe_svd_distill.pipeline.output import earlier_figures, judge_output
from moe_svd_distill.pipeline.pair import ModelPair, open_pair
from moe_svd_distill.pipeline.placement import execution_settings
from moe_svd_distill.pipeline.record import (
    Adapter,
    fates,
    is_nothing,
    load_adapter,
    make_record,
    tensor_records,
    unit_records,
)
from moe_svd_distill.pipeline.scale import ScaleDecision, combined_decision, decide_scale, not_searched
from moe_svd_distill.pipeline.texts import RunText, needs_text, read_run_text, refuse_missing_text
from moe_svd_distill.pipeline.units import make_work, prepare
from moe_svd_distill.recipe import Recipe, as_recipe
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.record import RunRecord
from moe_svd_distill.streaming import GROUPS

if TYPE_CHECKING:
    from moe_svd_distill.pipeline.schedule import TrainingSchedule
    from moe_svd_distill.pipeline.stage import StageInput, StageResult
    from moe_svd_distill.streaming import ScaledAdapter

__all__ = ["Adapter", "Listener", "distill", "load_adapter"]


def distill(recipe: Recipe | Path | str, on_event: Listener | None = None, *, force: bool = False) -> Adapter:
    """Run a recipe; goes on where an earlier run with the same output stopped.

    Args:
        recipe: What is asked for, or the file that says it.
        on_event: Told how it goes.
        force: Replace a finished adapter in the output that was made of other models or other text.

    Raises:
        DistillError: One of its kinds, each with its exit code; nothing half-written is left looking complete.
        NothingToTransferError: Every delta is exactly zero, or the pair has nothing to transfer.
    """
    tell: Listener = on_event or (lambda event: None)
    recipe = as_recipe(recipe)
    settings = execution_settings(recipe)
    for note in judge_output(recipe, force=force):
        tell(Noted(note))
    refuse_missing_text(recipe)
    tell(StageReached("fetching and checking the models"))
    with open_pair(recipe.teacher, recipe.student, remote_cache_gb=recipe.remote_cache_gb) as pair:
        base = base_model(recipe, pair)
        if recipe.base_model is None and (origin := pair.student.checkpoint.origin) is not None:
            tell(Noted(f"the adapter is for {base}, as {origin[1]} of the student says; --base-model names another"))
        for note in notes_on_sizes(pair):
            tell(Noted(note))
        models = pair.cache_keys()
        stages = choose_stages(recipe, pair)
        tell(Noted(f"method: {' and '.join(stages.names)} ({stages.reason})"))
        if stages.calibrated and not recipe.scale_search:
            tell(Noted("scale_search: false holds for the weights stage; the calibrated stage is always guarded"))
        text = None
        if needs_text(recipe, stages.names):
            tell(StageReached("reading the calibration text"))
            text = read_run_text(recipe, pair, stages.names)
        for shortfall in text.shortfalls() if text else ():
            tell(Noted(shortfall))
        plan = prepare(recipe, pair, settings) if stages.weights else None
        with OutputFolder(recipe.output) as output:
            run = _Run(recipe, pair, settings, stages, text, output, tell, models)
            record = run.complete(plan)
    return Adapter(recipe.output, record)


@dataclass(frozen=True)
class _Run:
    """One run that holds the output folder."""

    recipe: Recipe
    pair: ModelPair
    settings: Settings
    stages: Stages
    text: RunText | None
    output: OutputFolder
    tell: Listener
    models: tuple[str, str]

    def complete(self, plan: Plan | None) -> RunRecord:
        """Run the stages and publish the adapter."""
        if earlier := self.output.resumable():
            self.note(f"resuming from {self.recipe.output}: {earlier}; what fits this recipe is used again")
        units: list[dict[str, Any]] = []
        parts: tuple[Path, ...] = ()
        summary, decision = None, ScaleDecision.keep()
        if plan is not None:
            summary, parts, units = self.weights(plan)
            self.stage(AdapterChange(parts, decision))
            decision = self.scale()
        calibrated, head = None, None
        if self.stages.calibrated:
            calibrated, head = self.calibrate(plan is not None, decision)
        refined = None
        if self.stages.refined:
            refined, head = self.refine(AdapterChange(parts, decision, head))
            parts = ()
        digest = self.stage(AdapterChange(parts, decision, head))
        self.refuse_changed_models()
        self.reached("checking that PEFT loads it")
        check_loads(self.output.staged(ADAPTER_FILE).parent, self.pair.student.checkpoint.config)
        results = {"calibrated": calibrated, "refined": refined}
        whole = head_is_whole(self.recipe, self.pair)
        tensors = fates(self.pair.student, plan, units, {name: it for name, it in results.items() if it}, whole)
        facts = make_record(self.recipe, self.pair, self.stages, plan, tensors, summary)
        scale = combined_decision(decision if plan is not None else None, calibrated, refined)
        read = {} if self.text is None else self.text.record()
        facts |= {"calibration": read | (calibrated.record if calibrated else {})}
        facts |= {"refinement": refined.record} if refined else {}
        facts |= {
            "base_model": base_model(self.recipe, self.pair),
            "adapter_sha256": digest,
            "transferred": scale.transferred,
            "scale_search": scale.as_dict() | self._used(),
        }
        record = RunRecord.of(facts)
        figures, stale = earlier_figures(self.recipe.output, digest)
        stale += [] if self.stages.refined else [CURVE_FILE]
        write_text(self.output.staged(CARD_FILE), adapter_card(RunRecord.of(facts, figures)))
        record.write(self.output.staged(RECORD_FILE))
        for name in self.output.publish(stale):
            self.note(f"deleted {name}: it was of the adapter that lay here before")
        return record

    def weights(self, plan: Plan) -> tuple[ExecutionSummary, tuple[Path, ...], list[dict[str, Any]]]:
        """The weights stage: every unit of the plan, computed or found on the disk."""
        self.tell(UnitsPlanned(tuple((unit.label, unit.cost) for unit in plan.units)))
        work = make_work(self.recipe, self.pair)
        summary = execute(plan.units, work, self.output.parts, self.settings, self.tell)
        self.refuse_changed_models()
        units = unit_records(plan, summary.parts)
        if is_nothing(tensor_records(units)):
            raise NothingToTransferError(
                f"every delta between {self.recipe.teacher} and {self.recipe.student} is exactly zero, so the adapter "
                "would do nothing and is not written",
                "Choose a teacher that differs from the student",
            )
        return summary, tuple(summary.parts[unit.key] for unit in plan.units), units

    def refuse_changed_models(self) -> None:
        """The models must be at the end what they were at the beginning."""
        for model, before, now in zip(("teacher", "student"), self.models, self.pair.cache_keys(), strict=True):
            if before != now:
                raise BadDataError(f"the {model}'s files changed during the run", "Run the same command again")

    def stage(self, change: AdapterChange) -> str:
        """Write the adapter as it stands; returns its digest."""
        self.reached("writing the adapter")
        return stage_adapter(self.output, self.recipe, self.pair, change)

    def scale(self) -> ScaleDecision:
        """Scales of the weights stage."""
        if self.text is None or not self.recipe.scale_search:
            return not_searched("recipe: scale_search: false" if self.text else _no_text(self.recipe))
        step = "searching the scale on calibration text"
        self.reached(step, 0.0)
        staged = self.output.staged(ADAPTER_FILE).parent
        report, cache = partial(self.reached, step), self.recipe.cache or self.recipe.output / CACHE_FOLDER
        return decide_scale(staged, self.pair, self.text.search, self.settings.devices[0], cache, report)

    def calibrate(self, on_top: bool, decision: ScaleDecision) -> tuple[StageResult, Path | None]:
        """The calibrated stage; no part where nothing of it is kept."""
        from moe_svd_distill.pipeline.schedule import TextSize, schedule_calibrated

        text = self.text
        assert text is not None
        if self.stages.refined and text.fit is not None:
            text = replace(text, fit=text.fit.beginning(self.recipe.training.start_tokens))
        acting = on_top and any(decision.scales.values())
        given = self.given(text, self.staged_adapter(decision.scales) if acting else None)
        schedule = schedule_calibrated(
            self.recipe, self.pair.student, TextSize.of(text), self.settings.devices[0], head_alone=acting
        )
        fitted = self.distil_on_text(given, schedule)
        if on_top and not fitted.search.accepted:
            return fitted, None
        return fitted, write_head_part(self.output.parts, self.pair, self.recipe, fitted, alone=not on_top)

    def refine(self, change: AdapterChange) -> tuple[StageResult, Path]:
        """The refined stage, from what the stages before have made, or from an adapter that was named."""
        from moe_svd_distill.pipeline.schedule import TextSize, schedule_refined
        from moe_svd_distill.streaming import ScaledAdapter

        assert self.text is not None
        start = None
        if self.stages.start is not None:
            start = ScaledAdapter(self.stages.start, dict.fromkeys(GROUPS, 1.0))
        elif change.parts or change.head:
            self.stage(change)
            start = self.staged_adapter(dict.fromkeys(GROUPS, 1.0))
        given = self.given(self.text, start)
        schedule = schedule_refined(
            self.recipe, self.pair.student, self.stages.names, TextSize.of(self.text), self.settings.devices[0]
        )
        refined = self.distil_on_text(given, schedule)
        return refined, write_head_part(self.output.parts, self.pair, self.recipe, refined, alone=True)

    def given(self, text: RunText, start: ScaledAdapter | None) -> StageInput:
        """What a stage on text works with."""
        from moe_svd_distill.pipeline.stage import StageInput

        settings = self.settings
        return StageInput(
            self.recipe,
            self.pair,
            text,
            self.output.parts,
            settings.devices,
            settings.workers,
            start,
        )

    def staged_adapter(self, scales: Mapping[str, float]) -> ScaledAdapter:
        """The adapter as it stands."""
        from moe_svd_distill.streaming import ScaledAdapter

        return ScaledAdapter(self.output.staged(ADAPTER_FILE).parent, dict(scales))

    def distil_on_text(self, given: StageInput, schedule: TrainingSchedule) -> StageResult:
        """A stage on text."""
        from moe_svd_distill.pipeline.text_stage import distil_on_text

        return distil_on_text(given, schedule, self.reached, self.note)

    def reached(self, name: str, fraction: float | None = None) -> None:
        """Tell which step the run is at."""
        self.tell(StageReached(name, fraction))

    def note(self, text: str) -> None:
        """Tell what people should know."""
        self.tell(Noted(text))

    def _used(self) -> dict[str, list[str]]:
        """What an evaluation has to leave out."""
        if self.text is None:
            return {"used_documents": [], "used_groups": []}
        return {"used_documents": self.text.used_documents, "used_groups": self.text.used_groups}


def _no_text(recipe: Recipe) -> str:
    return "no calibration text was given" if not recipe.calibration else "recipe: scale_search: false"
