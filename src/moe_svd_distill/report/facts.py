"""What the pages of a run have to say, drawn from its record."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from moe_svd_distill.report.figures import number, with_minus
from moe_svd_distill.report.record import RunRecord, TrainingRecord
from moe_svd_distill.transfer.facts import TensorFacts

Side: TypeAlias = Literal["teacher", "student"]
Shown: TypeAlias = Literal["relative_delta", "residual", "matched_similarity"]
"""Fields of a tensor that are drawn."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ENDS = "ends"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_STAGES = ("auto", "zero", "weights", "calibrated", "weights+calibrated")
_ENDED = {
    "done": "all planned steps were done",
    "no more gain": "it was stopped early, because there was no more gain on calibration text",
    "diverged": "it was stopped because it diverged",
}


@dataclass(frozen=True)
class Grid:
    """One value for each role with a measured one, and layer; None where nothing was measured.

    Attributes:
        roles: Names of the rows.
        layers: Names of the columns: layer numbers, then `ENDS` for embeddings and head.
        values: Rows of values.
    """

    roles: tuple[str, ...]
    layers: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


def model_name(record: RunRecord, side: Side) -> str:
    """A model's name to show: its hub id, or the last part of its folder, so that no path of a machine is published."""
    source = (record.teacher if side == "teacher" else record.student).source or side
    return source if is_hub_id(source) else Path(source).name or side


def is_hub_id(source: str) -> bool:
    """Whether a model's name is one of the hub and not a folder."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).is_dir()


def headline(record: RunRecord) -> str:
    """What must be read first: the verdict on held-out text, else what the scale search found, else a warning."""
    if record.evaluation is not None and record.evaluation.verdict:
        return with_minus(record.evaluation.verdict)
    found = decision(record)
    if found.startswith("Not measured") or nothing_kept(record):
        return found
    note = "Not evaluated on held-out text; whether this adapter helps or harms there is not known."
    return f"{found} {note}".strip()


def decision(record: RunRecord) -> str:
    """What the scale search found; empty without one."""
    return with_minus(record.scale_search.decision)


def nothing_kept(record: RunRecord) -> str | None:
    """Why the scale search kept nothing: it harms, has no effect that counts (none), or is unproven; None if it did."""
    kind = record.scale_search.kind
    return kind if kind in ("harm", "none", "unproven") else None


def fate_counts(record: RunRecord) -> list[tuple[str, int]]:
    """Why tensors were left as they are, most frequent first."""
    kept = (tensor for tensor in record.tensors if not _changed(tensor))
    return Counter(tensor.get("reason") or "no reason recorded" for tensor in kept).most_common()


def unused_counts(record: RunRecord) -> list[tuple[str, int, str]]:
    """Why teacher tensors were not used: reason, how many, and one of them; most frequent first."""
    unused = record.unused_teacher_tensors
    counts = Counter(unused.values()).most_common()
    return [(reason, count, next(n for n, r in unused.items() if r == reason)) for reason, count in counts]


def lora_count(record: RunRecord) -> int:
    """Tensors that carry a delta."""
    return sum(map(_changed, record.tensors))


def ranks(record: RunRecord) -> dict[str, tuple[int, int]]:
    """Lowest and highest rank of body and head."""
    found: dict[str, list[int]] = {}
    for tensor in record.tensors:
        if _changed(tensor) and (rank := tensor.get("rank")):
            found.setdefault("head" if tensor.get("role") == "head" else "body", []).append(rank)
    return {part: (min(values), max(values)) for part, values in sorted(found.items())}


def serving_rank(record: RunRecord) -> int:
    """The highest rank a server meets; gate and up of experts are one module there and their ranks add up."""
    return max((tensor.get("rank", 0) * _modules(tensor) for tensor in record.tensors), default=0)


def vllm_rank(record: RunRecord) -> int | None:
    """What to give vLLM as --max-lora-rank; None if the rank is beyond what it takes."""
    return next((rank for rank in VLLM_RANKS if rank >= serving_rank(record)), None)


def grid(record: RunRecord, field: Shown) -> Grid | None:
    """Mean of a field over the tensors of each role in each layer; None if no tensor has it."""
    cells: dict[tuple[str, str], list[float]] = {}
    changed = [(tensor.get("role", "?"), _layer(tensor), tensor) for tensor in record.tensors if _changed(tensor)]
    for role, layer, tensor in changed:
        if field in tensor:
            cells.setdefault((role, ENDS if layer is None else str(layer)), []).append(tensor[field])
    if not cells:
        return None
    layers = [str(layer) for layer in sorted({layer for _, layer, _ in changed if layer is not None})]
    columns = (*layers, ENDS) if any(column == ENDS for _, column in cells) else tuple(layers)
    roles = tuple(dict.fromkeys(role for role, _ in cells))
    return Grid(roles, columns, tuple(tuple(_mean(cells.get((role, column))) for column in columns) for role in roles))


def depth_edges(record: RunRecord) -> list[tuple[int, int, float]]:
    """Student layer, teacher layer and weight of every arrow of the depth map."""
    return [(student, teacher, weight) for student, blend in record.depth_map for teacher, weight in blend]


def training_note(record: RunRecord) -> str:
    """How the refined stage trained, in a few sentences; empty for a run without it."""
    training = record.refinement
    if training is None:
        return ""
    sentences = (_trained(training), _rate(training), _kept(training), f"It began with {_beginning(record)}.")
    return " ".join(sentence for sentence in sentences if sentence)


def starting_adapter(record: RunRecord) -> str:
    """Name of the adapter that the recipe began with; empty where it began with a stage or from zero."""
    start = record.recipe.start
    return "" if start in _STAGES else Path(start).name


def _beginning(record: RunRecord) -> str:
    before = [stage for stage in (record.method or "").split("+") if stage not in ("", "refined")]
    if before:
        return f"the adapter of the {' and '.join(before)} stage{'s' if len(before) > 1 else ''}"
    named = starting_adapter(record)
    return f"the adapter {named}" if named else "the untouched student"


def _trained(training: TrainingRecord) -> str:
    steps, last = training.steps, training.curve[-1] if training.curve else None
    reached, seen = (last.step, last.tokens) if last else (None, None)
    text = f"Trained on {training.trained_on_tokens:,} tokens"
    if training.settings and math.isfinite(training.settings.epochs):
        text += f", {training.settings.epochs:g} times over"
    if steps:
        text += f", in {steps:,} steps" if reached in (None, steps) else f", in {reached:,} of {steps:,} steps"
    if steps and reached and seen:  # a step takes whole sequences, which may be fewer tokens than the settings say
        text += f" of {seen // reached:,} tokens"
    if training.training_seconds:
        text += f", for {training.training_seconds:,.0f} seconds"
    where = training.placement
    if where and where.devices:
        named = [f"{n} × {device}" if n > 1 else device for device, n in Counter(where.devices).items()]
        text += f", {'in memory' if where.resident else 'one layer in memory at a time'}, on {', '.join(named)}"
    return f"{text}; {_ENDED.get(training.ended, training.ended)}." if training.ended else f"{text}."


def _rate(training: TrainingRecord) -> str:
    if not training.settings or not training.rate_trials:
        return ""
    rate = training.settings.rate
    began = "where training began" if training.rate_tried_from_start else "with the untouched student"
    trials = len(training.rate_trials)
    return f"The learning rate, {rate:.2g}, was the best of {trials} in short trials that began {began}."


def _kept(training: TrainingRecord) -> str:
    if training.best is None or training.best >= len(training.curve):
        return ""
    kept = training.curve[training.best]
    before, after = number(training.curve[0].kl), number(kept.kl)
    if training.best == 0:
        return f"KL on calibration text was {before} before and never lower, so nothing of the training was kept."
    return f"KL on calibration text fell from {before} to {after} at step {kept.step:,}, which was kept."


def _changed(tensor: TensorFacts) -> bool:
    return tensor.get("fate") == "lora"


def _layer(tensor: TensorFacts) -> int | None:
    """Its decoder layer; None for what lies around them."""
    layer = tensor.get("layer")
    return layer if isinstance(layer, int) else None


def _modules(tensor: TensorFacts) -> int:
    """How many times over a server counts its rank."""
    return 2 if tensor.get("role", "").startswith("experts.") else 1


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
