"""What a recipe would do: pairings, unmatched tensors, ranks and sizes, and how the models are related."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from typing import Any

from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.pairing.plan import Plan
from moe_svd_distill.pairing.unit import TensorTask, UnitOfWork
from moe_svd_distill.pipeline.calibrating_cost import cost_of_calibrating
from moe_svd_distill.pipeline.comparison import outlook_of_method
from moe_svd_distill.pipeline.cost import BYTES, cost_of_training, readable
from moe_svd_distill.pipeline.duration import (
    StageCost,
    calibrating_cost_here,
    measure_pair,
    training_cost_here,
    weights_cost_here,
)
from moe_svd_distill.pipeline.pair import open_pair
from moe_svd_distill.pipeline.preparation import plan_pair
from moe_svd_distill.pipeline.relatedness import measure_relatedness, weights_at_hand
from moe_svd_distill.recipe import Recipe, supplied_values

UNDECIDED = "decided once the weights are on this machine: the embeddings get a pair if they are related"


def look_ahead(recipe: Recipe, on_measuring: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Everything ``distill`` would do, as plain JSON types. Of hub models nothing large is fetched.

    Args:
        recipe: What is asked for.
        on_measuring: Called before the machine's speed is measured, which takes some seconds.

    Raises:
        DistillError: Whatever would stop ``distill`` before its first unit.
    """
    with open_pair(recipe.teacher, recipe.student, headers_only=True) as pair:
        teacher, student = pair.teacher, pair.student
        at_hand = weights_at_hand(pair)
        undecided = not at_hand and recipe.embeddings == "auto"
        relatedness = measure_relatedness(pair, sample_weights=at_hand)
        method = outlook_of_method(recipe, relatedness)
        stages = method["stages"]
        try:
            plan = plan_pair(recipe.model_copy(update={"embeddings": "keep"}) if undecided else recipe, pair)
        except IncompatiblePairError as error:
            if "weights" in stages:
                raise
            plan = Plan((), (), {}, {}, (error.what,))
        refined = cost_of_training(recipe, pair, stages, at_hand=at_hand) if "refined" in stages else None
        calibrated = cost_of_calibrating(recipe, pair, as_start=refined is not None) if "calibrated" in stages else None
        changed_tasks = [task for unit in plan.units for task in unit.tasks if task.change]
        factors = sum(task.rank * sum(task.shape) for task in changed_tasks) * BYTES[recipe.dtype]
        here: dict[str, StageCost] = {}
        speed = None
        if at_hand and stages:
            on_measuring()
            if "weights" in stages:
                here["weights"] = weights_cost_here(recipe, pair, plan, factors)
            if calibrated or refined:
                speed = measure_pair(recipe, pair)
                if calibrated:
                    here["calibrated"] = calibrating_cost_here(calibrated, speed)
                if refined:
                    here["refined"] = training_cost_here(refined, speed, recipe.training.save_seconds)
    tasks = [task for unit in plan.units for task in unit.tasks]
    changed = Counter(task.role for task in tasks if task.change)
    kept = Counter(task.role for task in tasks if not task.change)
    ranks: dict[str, set[int]] = defaultdict(set)
    for task in tasks:
        if task.change:
            ranks[task.role].add(task.rank)
    covered = sum(prod(task.shape) for task in changed_tasks) * 2
    weights = [
        ["weights stage: units of work", str(len(plan.units))],
        ["weights stage: adapter, and as much again in parts", readable(factors)],
        ["weights stage: adapter relative to the weights it changes", f"{factors / covered:.0%}" if covered else "-"],
    ]
    return {
        "preset": _preset(recipe),
        "depth": [
            [str(blend.student), " + ".join(f"{weight:.2f} × {layer}" for layer, weight in blend.teacher)]
            for blend in plan.depth
        ],
        "roles": [
            [role, str(changed[role]), str(kept[role]), ", ".join(map(str, sorted(ranks[role])))]
            for role in sorted({task.role for task in tasks})
        ],
        "sizes": [
            ["teacher", readable(teacher.checkpoint.total_bytes)],
            ["student", readable(student.checkpoint.total_bytes)],
            *(weights if "weights" in stages else []),
            *(calibrated.rows() if calibrated else []),
            *(refined.rows() if refined else []),
        ],
        "pairings": {task.name: _made_from(task, unit) for unit in plan.units for task in unit.tasks if task.change},
        "notes": list(plan.notes),
        "kept": {
            task.name: UNDECIDED if undecided and task.role == "embedding" else task.reason
            for task in tasks
            if not task.change
        },
        "unused_teacher": dict(plan.unused_teacher),
        "ignored_student": dict(plan.ignored_student),
        "relatedness": relatedness.as_dict(),
        "method": method,
        "calibrated": asdict(calibrated) if calibrated else None,
        "refined": refined.as_dict() if refined else None,
        "speed": asdict(speed) if speed else None,
        "here": {stage: asdict(cost) for stage, cost in here.items()},
    }


def _made_from(task: TensorTask, unit: UnitOfWork) -> str:
    """The teacher's part in a change; which experts make which, clustering decides in the run."""
    if task.sources:
        return " + ".join(f"{source.weight:.2f} × {source.view.name}" for source in task.sources)
    layers = " + ".join(f"{layer.weight:.2f} × layer {layer.layer}" for layer in unit.teacher_experts)
    return f"{len(unit.teacher_experts[0].tensors)} experts of {layers}"


def _preset(recipe: Recipe) -> dict[str, Any] | None:
    """The preset's name, what it supplies, and what is given otherwise in place of it."""
    if recipe.preset is None:
        return None
    supplied, otherwise = supplied_values(recipe)
    return {"name": recipe.preset, "supplied": supplied, "given_otherwise": otherwise}
