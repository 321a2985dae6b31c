"""What a recipe would do: stages and why, pairings, ranks and sizes, and what that takes on this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.execution.events import Listener, StageReached
from moe_svd_distill.pairing.plan import Pairing
from moe_svd_distill.pairing.unit import TensorTask, UnitOfWork
from moe_svd_distill.pipeline.cost import (
    BYTES,
    TrainingCost,
    costs_of_training,
    readable,
)
from moe_svd_distill.pipeline.duration import (
    PairSpeed,
    StageCost,
    measure_pair,
    training_cost_here,
    weights_cost_here,
)
from moe_svd_distill.pipeline.method import (
    Stages,
    automatic_choice,
    measure_relatedness,
    notes_on_sizes,
    refuse_nothing,
    stages_for,
)
from moe_svd_distill.pipeline.output import judge_output
from moe_svd_distill.pipeline.pair import ModelPair, open_pair
from moe_svd_distill.pipeline.placement import execution_settings, free_here
from moe_svd_distill.pipeline.texts import RunText, needs_text, read_run_text, refuse_missing_text
from moe_svd_distill.pipeline.units import plan_pair
from moe_svd_distill.recipe import Recipe, as_recipe, supplied_values
from moe_svd_distill.tracking import require_trackers

UNDECIDED = "decided once the weights are on this machine: the embeddings get a pair if they are related"


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What ``distill`` would do.

    Attributes:
        recipe: What is asked for.
        bytes: Stored, of teacher and student.
        stages: What is run, why, and how the models are related.
        pairing: The weights stage's work; empty, with a note, where it cannot be done and is not asked for.
        undecided: Whether it is known only with the weights if the embeddings change.
        text: What would be read; None where no stage reads any.
        warnings: What people should know before the run.
        training: Name of each stage on text to what it would take.
        speed: What was measured of this machine; None where nothing was.
        here: Stage to what it would take on this machine; empty where the weights are not on it.
    """

    recipe: Recipe
    bytes: tuple[int, int]
    stages: Stages
    pairing: Pairing
    undecided: bool
    text: RunText | None
    warnings: tuple[str, ...]
    training: Mapping[str, TrainingCost]
    speed: PairSpeed | None
    here: Mapping[str, StageCost]

    def __repr__(self) -> str:
        seconds = f", about {sum(cost.seconds for cost in self.here.values()):.0f} s" if self.here else ""
        return f"Plan({' and '.join(self.stages.names) or 'nothing'}{seconds})"

    @property
    def factors_bytes(self) -> int:
        """Size of all pairs of the weights stage."""
        return sum(task.rank * sum(task.shape) for task in self._tasks(True)) * BYTES[self.recipe.dtype]

    def as_dict(self) -> Mapping[str, object]:
        """Plain JSON types, and the rows of the tables."""
        pairing, stages, recipe = self.pairing, self.stages, self.recipe
        return {
            "preset": _preset(recipe),
            "depth": self.depth,
            "roles": self.roles,
            "sizes": self.sizes,
            "pairings": self.pairings,
            "notes": list(pairing.notes),
            "warnings": list(self.warnings),
            "text": self.text.record() if self.text else None,
            "kept": self.kept,
            "unused_teacher": dict(pairing.unused_teacher),
            "ignored_student": dict(pairing.ignored_student),
            "relatedness": stages.relatedness.as_dict(),
            "method": {
                "asked": recipe.method,
                "auto": automatic_choice(recipe, stages.relatedness).as_dict(),
                "stages": list(stages.names),
                "start": None if stages.start is None else str(stages.start),
            },
            "calibrated": None,
            "refined": None,
            **{stage: asdict(cost) for stage, cost in self.training.items()},
            "speed": asdict(self.speed) if self.speed else None,
            "here": {stage: asdict(cost) for stage, cost in self.here.items()},
            "free": free_here(recipe),
        }

    @property
    def depth(self) -> list[list[str]]:
        """Student layer, and the teacher layers it is set against."""
        return [
            [str(number), " + ".join(f"{weight:.2f} × {layer}" for layer, weight in behind)]
            for number, behind in enumerate(self.pairing.depth)
        ]

    @property
    def pairings(self) -> Mapping[str, str]:
        """Matrix that changes to what its change is made from."""
        units = self.pairing.units
        return {task.name: _made_from(task, unit) for unit in units for task in unit.tasks if task.change}

    @property
    def kept(self) -> Mapping[str, str]:
        """Matrix that does not change to the reason."""
        return {
            task.name: UNDECIDED if self.undecided and task.role == "embedding" else task.reason
            for task in self._tasks(False)
        }

    def _tasks(self, change: bool) -> list[TensorTask]:
        return [task for unit in self.pairing.units for task in unit.tasks if task.change == change]

    @property
    def roles(self) -> list[list[str]]:
        """Role, tensors that change and that are kept, ranks."""
        found: dict[str, list[TensorTask]] = defaultdict(list)
        for task in (*self._tasks(True), *self._tasks(False)):
            found[task.role].append(task)
        rows = []
        for role, tasks in sorted(found.items()):
            ranks = [task.rank for task in tasks if task.change]
            rows.append([role, str(len(ranks)), str(len(tasks) - len(ranks)), ", ".join(map(str, sorted(set(ranks))))])
        return rows

    @property
    def sizes(self) -> list[list[str]]:
        """What it is a size of, and the size."""
        factors, covered = self.factors_bytes, sum(prod(task.shape) for task in self._tasks(True)) * 2
        weights = [
            ["units of work", str(len(self.pairing.units))],
            ["adapter, and as much again in parts", readable(factors)],
            ["adapter relative to the weights it changes", f"{factors / covered:.0%}" if covered else "-"],
        ]
        return [
            *([name, readable(size)] for name, size in zip(("teacher", "student"), self.bytes, strict=True)),
            *([f"weights stage: {name}", value] for name, value in weights if self.stages.weights),
            *(row for cost in self.training.values() for row in cost.rows()),
        ]


def make_plan(recipe: Recipe | Path | str, on_event: Listener | None = None, *, force: bool = False) -> Plan:
    """Everything ``distill`` would do, up to its first unit of work. Of hub models no weights are fetched.

    Args:
        recipe: What is asked for, or the file that says it.
        on_event: Told what is being done.
        force: As of ``distill``.

    Raises:
        DistillError: Whatever would stop ``distill`` before its first unit.
    """
    tell: Listener = on_event or (lambda event: None)
    recipe = as_recipe(recipe)
    execution_settings(recipe)  # refuses devices that are not there
    require_trackers(recipe.report_to)
    warnings = judge_output(recipe, force=force)
    refuse_missing_text(recipe)
    tell(StageReached("fetching and checking the models"))
    with open_pair(recipe.teacher, recipe.student, headers_only=True) as pair:
        at_hand = pair.at_hand
        undecided = not at_hand and recipe.embeddings == "auto"
        warnings += notes_on_sizes(pair)
        stages = stages_for(recipe, measure_relatedness(pair, sample_weights=at_hand))
        if at_hand:
            refuse_nothing(recipe, stages)
        text = None
        if needs_text(recipe, stages.names):
            tell(StageReached("reading the calibration text"))
            text = read_run_text(recipe, pair, stages.names)
            warnings += text.shortfalls()
        try:
            pairing = plan_pair(recipe.model_copy(update={"embeddings": "keep"}) if undecided else recipe, pair)
        except IncompatiblePairError as error:
            if stages.weights:
                raise
            pairing = Pairing((), (), {}, {}, (error.what,))
        training = costs_of_training(recipe, pair, stages.names, at_hand=at_hand, text=text)
        total = pair.teacher.checkpoint.total_bytes, pair.student.checkpoint.total_bytes
        plan = Plan(recipe, total, stages, pairing, undecided, text, tuple(warnings), training, None, {})
        if not (at_hand and stages.names):
            return plan
        tell(StageReached("measuring the speed of this machine"))
        return _measured(plan, pair)


def _measured(plan: Plan, pair: ModelPair) -> Plan:
    """With what the stages would take on this machine, where the weights are."""
    here: dict[str, StageCost] = {}
    speed = measure_pair(plan.recipe, pair) if plan.training else None
    if plan.stages.weights:
        here["weights"] = weights_cost_here(plan.recipe, pair, plan.pairing, plan.factors_bytes)
    if speed:
        for stage, cost in plan.training.items():
            here[stage] = training_cost_here(cost, speed, plan.recipe.training.save_seconds)
    return replace(plan, speed=speed, here=here)


def _made_from(task: TensorTask, unit: UnitOfWork) -> str:
    """The teacher's part in a change; which experts make which, clustering decides in the run."""
    if task.sources:
        return " + ".join(f"{source.weight:.2f} × {source.view.name}" for source in task.sources)
    layers = " + ".join(f"{layer.weight:.2f} × layer {layer.layer}" for layer in unit.teacher_experts)
    return f"{len(unit.teacher_experts[0].tensors)} experts of {layers}"


def _preset(recipe: Recipe) -> Mapping[str, object] | None:
    """The preset's name, what it supplies, and what is given otherwise in place of it."""
    if recipe.preset is None:
        return None
    supplied, otherwise = supplied_values(recipe)
    return {"name": recipe.preset, "supplied": supplied, "given_otherwise": otherwise}
