"""Distil: two models and a recipe in, a checked adapter out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.errors import BadDataError, NothingToTransferError
from moe_svd_distill.evaluation.scale_search import ScaleDecision
from moe_svd_distill.execution.events import Listener, Measured, Noted, StageReached, UnitsPlanned, counting
from moe_svd_distill.execution.publish import OutputFolder
from moe_svd_distill.execution.supervisor import ExecutionSettings, ExecutionSummary, execute
from moe_svd_distill.files.names import ADAPTER_FILE, CACHE_FOLDER, CARD_FILE, CURVE_FILE, RECORD_FILE
from moe_svd_distill.files.writing import write_text
from moe_svd_distill.pairing.plan import Pairing
from moe_svd_distill.pipeline.assembly import AdapterChange, base_model, stage_adapter, write_head_part
from moe_svd_distill.pipeline.fates import is_nothing, tensor_records
from moe_svd_distill.pipeline.method import Stages, choose_stages, notes_on_sizes
from moe_svd_distill.pipeline.output import earlier_figures, essentials, finished_digest, judge_output
from moe_svd_distill.pipeline.pair import ModelPair, open_pair
from moe_svd_distill.pipeline.placement import execution_settings
from moe_svd_distill.pipeline.record import (
    Adapter,
    facts_of_text,
    load_adapter,
    make_record,
    unit_records,
)
from moe_svd_distill.pipeline.scale import KEPT_WHOLE, decide_scale, not_searched
from moe_svd_distill.pipeline.schedule import TrainingSchedule, schedule_calibrated, schedule_refined
from moe_svd_distill.pipeline.stage import StageInput, StageResult
from moe_svd_distill.pipeline.text_stage import distil_on_text
from moe_svd_distill.pipeline.texts import RunText, TextSize, needs_text, read_run_text, refuse_missing_text
from moe_svd_distill.pipeline.tracked_figures import search_figures
from moe_svd_distill.pipeline.units import make_work, prepare
from moe_svd_distill.recipe import Recipe, as_recipe
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.record import RunRecord
from moe_svd_distill.streaming import GROUPS, ScaledAdapter
from moe_svd_distill.tracking import require_trackers, tracked

__all__ = ["Adapter", "Listener", "distill", "load_adapter"]


def distill(recipe: Recipe | Path | str, on_event: Listener | None = None, *, force: bool = False) -> Adapter:
    """Run a recipe; goes on where an earlier run with the same output stopped.

    Args:
        recipe: What is asked for, or the file that says it.
        on_event: Told how it goes.
        force: Replace a finished adapter in the output that another recipe has made.

    Raises:
        DistillError: One of its kinds, each with its exit code; nothing half-written is left looking complete.
        NothingToTransferError: Every delta is exactly zero, or the pair has nothing to transfer.
    """
    tell: Listener = on_event or (lambda event: None)
    recipe = as_recipe(recipe)
    settings = execution_settings(recipe)
    require_trackers(recipe.report_to)
    for note in judge_output(recipe, force=force):
        tell(Noted(note))
    refuse_missing_text(recipe)
    tell(StageReached("fetching and checking the models"))

    models = open_pair(
        recipe.teacher, recipe.student, remote_cache_gb=recipe.remote_cache_gb, on_download=counting(tell)
    )
    with models as pair:
        base = base_model(recipe, pair)
        if recipe.base_model is None and (origin := pair.student.checkpoint.origin) is not None:
            tell(Noted(f"the adapter is for {base}, as {origin[1]} of the student says; --base-model names another"))
        for note in notes_on_sizes(pair):
            tell(Noted(note))
        keys = pair.cache_keys()
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
        asked = {**essentials(recipe), "models": keys}
        with OutputFolder(recipe.output) as output, tracked(recipe.report_to, output.path, tell, asked) as told:
            run = _Run(recipe, pair, settings, stages, text, output, told, keys)
            record = run.complete(plan)
    return Adapter(recipe.output, record)


@dataclass(frozen=True)
class _Run:
    """One run that holds the output folder."""

    recipe: Recipe
    pair: ModelPair
    settings: ExecutionSettings
    stages: Stages
    text: RunText | None
    output: OutputFolder
    tell: Listener
    models: tuple[str, str]

    def complete(self, plan: Pairing | None) -> RunRecord:
        """Run the stages and publish the adapter."""
        earlier = self.output.resumable()
        if finished := finished_digest(self.recipe):
            kept = f"{earlier} are used again where they still fit" if earlier else "without parts, it is made anew"
            self.note(f"{self.recipe.output} holds the finished adapter of this recipe: {kept}")
        elif earlier:
            self.note(f"resuming from {self.recipe.output}: {earlier}; what fits this recipe is used again")
        summary, change = None, AdapterChange((), KEPT_WHOLE)
        if plan is not None:
            summary = self.project_weights(plan)
            change = replace(change, parts=[summary.parts[unit.key] for unit in plan.units])
            self.stage(change)
            change = replace(change, scale=self.scale_of_weights())
        scale, results = change.scale if plan else None, {}
        if self.stages.calibrated:
            results["calibrated"], change = self.calibrate(change)
        if self.stages.refined:
            results["refined"], change = self.refine(change)
        digest = self.stage(change)
        self.refuse_changed_models()
        self.reached("checking that PEFT loads it")
        check_loads(self.staged, self.pair.student.checkpoint.config)
        facts = {
            **make_record(self.recipe, self.pair, self.stages, plan, summary, results),
            **facts_of_text(self.text, scale, results),
            "base_model": base_model(self.recipe, self.pair),
            "adapter_sha256": digest,
        }
        record = RunRecord.of(facts)
        figures, stale = earlier_figures(self.recipe.output, digest)
        stale += [] if self.stages.refined else [CURVE_FILE]
        write_text(self.output.staged(CARD_FILE), adapter_card(RunRecord.of(facts, figures)))
        record.write(self.output.staged(RECORD_FILE))
        for name in self.output.publish(stale):
            self.note(f"deleted {name}: it was of the adapter that lay here before")
        if finished == digest:
            self.note(f"this recipe was finished already: the adapter is the same as before (sha256 {digest})")
        return record

    def project_weights(self, plan: Pairing) -> ExecutionSummary:
        """The weights stage: every unit of the plan, computed or found on the disk."""
        self.tell(UnitsPlanned(tuple((unit.label, unit.cost) for unit in plan.units)))
        work = make_work(self.recipe, self.pair)
        summary = execute(plan.units, work, self.output.parts, self.settings, self.tell)
        self.refuse_changed_models()
        if is_nothing(tensor_records(unit_records(plan, summary))):
            raise NothingToTransferError(
                f"every delta between {self.recipe.teacher} and {self.recipe.student} is exactly zero, so the adapter "
                "would do nothing and is not written",
                "Choose a teacher that differs from the student",
            )
        return summary

    def scale_of_weights(self) -> ScaleDecision:
        """Scales of the weights stage."""
        recipe = self.recipe
        if self.text is None or not recipe.scale_search:
            return not_searched(
                "recipe: scale_search: false" if recipe.calibration else "no calibration text was given"
            )
        step = "searching the scale on calibration text"
        self.reached(step, 0.0)
        report, cache = partial(self.reached, step), recipe.cache or recipe.output / CACHE_FOLDER
        found = decide_scale(self.staged, self.pair, self.text.search, self.settings.devices[0], cache, report)
        self.tell(Measured("scale search of the weights", search_figures(found)))
        return found

    def calibrate(self, change: AdapterChange) -> tuple[StageResult, AdapterChange]:
        """The calibrated stage, on top of the weights stage or alone; there is no part where nothing of it is kept."""
        recipe, text, on_top = self.recipe, self.text, self.stages.weights
        assert text is not None
        if self.stages.refined and text.fit is not None:
            text = replace(text, fit=text.fit.beginning(recipe.training.start_tokens))
        acting = on_top and any(change.scale.scales.values())
        start = ScaledAdapter(self.staged, dict(change.scale.scales)) if acting else None
        schedule = schedule_calibrated(
            recipe, self.pair.student, TextSize.of(text), self.settings.devices[0], head_alone=acting
        )
        result = self.distil_on_text(text, start, schedule)
        if on_top and not result.search.accepted:
            return result, change
        head = write_head_part(self.output.parts, self.pair, recipe, result, alone=not on_top)
        return result, replace(change, head=head)

    def refine(self, change: AdapterChange) -> tuple[StageResult, AdapterChange]:
        """The refined stage, from what the stages before have made, or from an adapter that was named."""
        recipe, text, start = self.recipe, self.text, self.stages.start
        assert text is not None
        if start is None and (change.parts or change.head):
            self.stage(change)
            start = self.staged
        adapter = None if start is None else ScaledAdapter(start, dict.fromkeys(GROUPS, 1.0))
        schedule = schedule_refined(
            recipe, self.pair.student, self.stages.names, TextSize.of(text), self.settings.devices[0]
        )
        result = self.distil_on_text(text, adapter, schedule)
        head = write_head_part(self.output.parts, self.pair, recipe, result, alone=True)
        return result, AdapterChange((), change.scale, head)

    def distil_on_text(self, text: RunText, start: ScaledAdapter | None, schedule: TrainingSchedule) -> StageResult:
        """A stage on text."""
        given = StageInput(self.recipe, self.pair, text, self.output.parts, self.settings, start)
        result = distil_on_text(given, schedule, self.tell)
        self.tell(Measured(f"scale search of {schedule.stage}", search_figures(result.search)))
        return result

    def stage(self, change: AdapterChange) -> str:
        """Write the adapter as it stands; returns its digest."""
        self.reached("writing the adapter")
        return stage_adapter(self.output, self.recipe, self.pair, change)

    @property
    def staged(self) -> Path:
        """The folder of the adapter as it stands."""
        return self.output.staged(ADAPTER_FILE).parent

    def refuse_changed_models(self) -> None:
        """The models must be at the end what they were at the beginning."""
        for model, before, now in zip(("teacher", "student"), self.models, self.pair.cache_keys(), strict=True):
            if before != now:
                raise BadDataError(f"the {model}'s files changed during the run", "Run the same command again")

    def reached(self, name: str, fraction: float | None = None) -> None:
        """Tell which step the run is at."""
        self.tell(StageReached(name, fraction))

    def note(self, text: str) -> None:
        """Tell what people should know."""
        self.tell(Noted(text))
