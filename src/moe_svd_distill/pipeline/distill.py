"""Distil: two models and a recipe in, a checked adapter out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.errors import BadDataError, NothingToTransferError
from moe_svd_distill.execution.events import Event
from moe_svd_distill.execution.publish import OutputFolder
from moe_svd_distill.execution.supervisor import ExecutionSummary, Settings, execute
from moe_svd_distill.files.names import ADAPTER_FILE, CACHE_FOLDER, CARD_FILE, RECORD_FILE
from moe_svd_distill.files.writing import write_text
from moe_svd_distill.pairing.plan import Plan
from moe_svd_distill.pipeline.assembly import AdapterChange, base_model, head_is_whole, stage_adapter, write_head_part
from moe_svd_distill.pipeline.method import Stages, choose_stages
from moe_svd_distill.pipeline.pair import ModelPair, open_pair
from moe_svd_distill.pipeline.placement import execution_settings
from moe_svd_distill.pipeline.record import (
    Adapter,
    fates,
    is_nothing,
    load_adapter,
    make_record,
    refuse_foreign_folder,
    tensor_records,
    unit_records,
)
from moe_svd_distill.pipeline.scale import ScaleDecision, combined_decision, decide_scale, not_searched
from moe_svd_distill.pipeline.texts import RunText, read_run_text, refuse_missing_text
from moe_svd_distill.pipeline.units import make_work, prepare
from moe_svd_distill.recipe import Recipe
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.record import RunRecord
from moe_svd_distill.streaming import GROUPS

if TYPE_CHECKING:
    from moe_svd_distill.pipeline.schedule import TrainingSchedule
    from moe_svd_distill.pipeline.stage import StageInput, StageResult
    from moe_svd_distill.streaming import ScaledAdapter

__all__ = ["Adapter", "Listener", "distill", "load_adapter"]


@dataclass(frozen=True)
class Listener:
    """Who is told how a run goes; every callback is optional.

    Attributes:
        on_plan: Told the number of units and their total cost before work begins.
        on_event: Told every event of the workers.
        on_stage: Told the name of each later stage, and a fraction done or None.
        on_note: Told what people should know before the work begins.
    """

    on_plan: Callable[[list[tuple[str, int]]], None] = field(default=lambda units: None)
    on_event: Callable[[Event], None] = field(default=lambda event: None)
    on_stage: Callable[[str, float | None], None] = field(default=lambda name, fraction: None)
    on_note: Callable[[str], None] = field(default=lambda note: None)


def distill(recipe: Recipe, listener: Listener | None = None) -> Adapter:
    """Run a recipe; goes on where an earlier run with the same output stopped.

    Args:
        recipe: What is asked for.
        listener: Who is told how it goes.

    Raises:
        DistillError: One of its kinds, each with its exit code; nothing half-written is left looking complete.
        NothingToTransferError: Every delta is exactly zero, or the pair has nothing to transfer.
    """
    listener = listener or Listener()
    settings = execution_settings(recipe)
    refuse_foreign_folder(recipe.output)
    refuse_missing_text(recipe)
    with open_pair(recipe.teacher, recipe.student, remote_cache_gb=recipe.remote_cache_gb) as pair:
        base = base_model(recipe, pair)
        if recipe.base_model is None and (origin := pair.student.checkpoint.origin) is not None:
            listener.on_note(
                f"the adapter is for {base}, as {origin[1]} of the student says; --base-model names another"
            )
        models = pair.cache_keys()
        stages = choose_stages(recipe, pair)
        listener.on_note(f"method: {' and '.join(stages.names)} ({stages.reason})")
        if stages.calibrated and not recipe.scale_search:
            listener.on_note("scale_search: false holds for the weights stage; the calibrated stage is always guarded")
        fitting = stages.calibrated or stages.refined
        searching = fitting or (bool(recipe.calibration) and recipe.scale_search)
        text = read_run_text(recipe, pair, stages.names) if searching else None
        for shortfall in text.shortfalls() if text else ():
            listener.on_note(shortfall)
        plan = prepare(recipe, pair, settings) if stages.weights else None
        with OutputFolder(recipe.output) as output:
            run = _Run(recipe, pair, settings, stages, text, output, listener, models)
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
    listener: Listener
    models: tuple[str, str]

    def complete(self, plan: Plan | None) -> RunRecord:
        """Run the stages and publish the adapter."""
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
        self.listener.on_stage("checking that PEFT loads it", None)
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
        write_text(self.output.staged(CARD_FILE), adapter_card(record))
        record.write(self.output.staged(RECORD_FILE))
        self.output.publish()
        return record

    def weights(self, plan: Plan) -> tuple[ExecutionSummary, tuple[Path, ...], list[dict[str, Any]]]:
        """The weights stage: every unit of the plan, computed or found on the disk."""
        self.listener.on_plan([(unit.label, unit.cost) for unit in plan.units])
        work = make_work(self.recipe, self.pair)
        summary = execute(plan.units, work, self.output.parts, self.settings, self.listener.on_event)
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
        self.listener.on_stage("writing the adapter", None)
        return stage_adapter(self.output, self.recipe, self.pair, change)

    def scale(self) -> ScaleDecision:
        """Scales of the weights stage."""
        if self.text is None or not self.recipe.scale_search:
            return not_searched("recipe: scale_search: false" if self.text else _no_text(self.recipe))
        step = "searching the scale on calibration text"
        self.listener.on_stage(step, 0.0)
        staged = self.output.staged(ADAPTER_FILE).parent
        report, cache = partial(self.listener.on_stage, step), self.recipe.cache or self.recipe.output / CACHE_FOLDER
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

        return distil_on_text(given, schedule, self.listener.on_stage, self.listener.on_note)

    def _used(self) -> dict[str, list[str]]:
        """What an evaluation has to leave out."""
        if self.text is None:
            return {"used_documents": [], "used_groups": []}
        return {"used_documents": self.text.used_documents, "used_groups": self.text.used_groups}


def _no_text(recipe: Recipe) -> str:
    return "no calibration text was given" if not recipe.calibration else "recipe: scale_search: false"
