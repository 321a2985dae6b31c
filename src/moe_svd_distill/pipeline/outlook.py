"""What a recipe would do: pairings, unmatched tensors, ranks and sizes, and how the models are related."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import prod
from typing import Any

from moe_svd_distill.pipeline.comparison import outlook_of_method
from moe_svd_distill.pipeline.pair import ModelPair, open_pair
from moe_svd_distill.pipeline.preparation import execution_settings, plan_pair
from moe_svd_distill.pipeline.relatedness import measure_relatedness, weights_at_hand
from moe_svd_distill.recipe import Recipe

UNDECIDED = "decided once the weights are on this machine: the embeddings get a pair if they are related"
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def look_ahead(recipe: Recipe) -> dict[str, Any]:
    """Everything ``distill`` would do, as plain JSON types. Of hub models nothing large is fetched.

    Raises:
        DistillError: Whatever would stop ``distill`` before its first unit.
    """
    with open_pair(recipe.teacher, recipe.student, headers_only=True) as pair:
        teacher, student = pair.teacher, pair.student
        at_hand = weights_at_hand(pair)
        undecided = not at_hand and recipe.embeddings == "auto"
        plan = plan_pair(recipe.model_copy(update={"embeddings": "keep"}) if undecided else recipe, pair)
        relatedness = measure_relatedness(pair, sample_weights=at_hand)
    tasks = [task for unit in plan.units for task in unit.tasks]
    changed = Counter(task.role for task in tasks if task.change)
    kept = Counter(task.role for task in tasks if not task.change)
    ranks: dict[str, set[int]] = defaultdict(set)
    for task in tasks:
        if task.pair:
            ranks[task.role].add(task.rank)
    factors = sum(task.rank * sum(task.shape) for task in tasks if task.pair) * BYTES[recipe.dtype]
    covered = sum(prod(task.shape) for task in tasks if task.pair) * 2
    method = outlook_of_method(recipe.method, relatedness, has_text=bool(recipe.calibration))
    weights = [
        ["weights stage: units of work", str(len(plan.units))],
        ["weights stage: adapter, and as much again in parts", _readable(factors)],
        ["weights stage: adapter relative to the weights it changes", f"{factors / covered:.0%}" if covered else "-"],
    ]
    return {
        "depth": [
            [str(blend.student), " + ".join(f"{weight:.2f} × {layer}" for layer, weight in blend.teacher)]
            for blend in plan.depth
        ],
        "roles": [
            [role, str(changed[role]), str(kept[role]), ", ".join(map(str, sorted(ranks[role])))]
            for role in sorted({task.role for task in tasks})
        ],
        "sizes": [
            ["teacher", _readable(teacher.checkpoint.total_bytes)],
            ["student", _readable(student.checkpoint.total_bytes)],
            *(weights if "weights" in method["stages"] else []),
            *(_cost_of_calibrating(recipe, pair) if "calibrated" in method["stages"] else []),
        ],
        "kept": {
            task.name: UNDECIDED if undecided and task.role == "embedding" else task.reason
            for task in tasks
            if not task.change
        },
        "unused_teacher": dict(plan.unused_teacher),
        "ignored_student": dict(plan.ignored_student),
        "relatedness": relatedness.as_dict(),
        "method": method,
    }


def _cost_of_calibrating(recipe: Recipe, pair: ModelPair) -> list[list[str]]:
    """What the calibrated stage would read, compute and keep."""
    from moe_svd_distill.fitting.copies import default_copies

    copies = default_copies(recipe.tokens) if recipe.copies == "auto" else recipe.copies
    tokens = recipe.tokens * (1 + copies) + recipe.scale_search_tokens
    teacher, student = pair.teacher, pair.student
    widths = teacher.layout.geometry.hidden + student.layout.geometry.hidden * (2 if recipe.last_layers else 1)
    item = 2 if any(device.startswith("cuda") for device in execution_settings(recipe).devices) else 4
    once, twice = teacher.checkpoint.total_bytes, 2 * student.checkpoint.total_bytes
    return [
        ["calibrated stage: tokens read", f"{tokens:,} ({copies} copies of {recipe.tokens:,}, and the search text)"],
        ["calibrated stage: weights read", f"{_readable(once)} (teacher once), {_readable(twice)} (student twice)"],
        ["calibrated stage: hidden states kept", _readable(tokens * widths * item)],
    ]


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
