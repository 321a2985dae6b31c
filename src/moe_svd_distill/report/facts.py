"""What the pages of a run have to say, drawn from run.json; everything in it may be absent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = Mapping[str, Any]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ENDS = "ends"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class FigureRow:
    """One line of the table of figures, as text.

    Attributes:
        name: Who was measured.
        cells: KL, cross-entropy, perplexity, top-1 agreement, KL gap closed, cross-entropy gap closed.
    """

    name: str
    cells: tuple[str, str, str, str, str, str]


FIGURE_COLUMNS = (
    "KL to the teacher",
    "cross-entropy",
    "perplexity",
    "top-1 agreement",
    "KL gap closed",
    "cross-entropy gap closed",
)


@dataclass(frozen=True)
class Grid:
    """One value for each role and layer; None where nothing was measured.

    Attributes:
        roles: Names of the rows.
        layers: Names of the columns: layer numbers, then `ENDS` for embeddings and head.
        values: Rows of values.
    """

    roles: tuple[str, ...]
    layers: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


def model_name(record: Record, side: str) -> str:
    """A model's name to show: its hub id, or the last part of its folder, so that no path of a machine is published."""
    source = str(part_of(record, side).get("source") or side)
    return source if is_hub_id(source) else Path(source).name or side


def is_hub_id(source: str) -> bool:
    """Whether a model's name is one of the hub and not a folder."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).is_dir()


def headline(record: Record) -> str:
    """What must be read first: the verdict on held-out text, else what the scale search found, else a warning."""
    verdict = part_of(record, "evaluation").get("verdict")
    if verdict:
        return str(verdict)
    decision = str(part_of(record, "scale_search").get("decision") or "")
    if decision.startswith("Not measured") or nothing_kept(record):
        return decision
    note = "Not evaluated on held-out text; whether this adapter helps or harms there is not known."
    return f"{decision} {note}".strip()


def nothing_kept(record: Record) -> str | None:
    """Why the scale search kept nothing: it harms, has no effect that counts (none), or is unproven; None if it did."""
    kind = part_of(record, "scale_search").get("kind")
    return str(kind) if kind in ("harm", "none", "unproven") else None


def figure_rows(evaluation: Record) -> list[FigureRow]:
    """The table of figures: untouched student, adapter, controls, teacher."""
    if not evaluation.get("student"):
        return []
    rows = [
        _figure_row("student, untouched", evaluation.get("student"), None),
        _figure_row("student with this adapter", evaluation.get("adapted"), evaluation.get("gap_closed")),
    ]
    for control in evaluation.get("controls") or ():
        name = f"control: random delta of the same size, seed {control.get('seed', '?')}"
        rows.append(_figure_row(name, control.get("figures"), control.get("gap_closed")))
    temperature = part_of(evaluation, "temperature_control")
    if temperature:
        name = f"control: only the temperature of the student's logits, {number(temperature.get('temperature'), 3)}"
        rows.append(_figure_row(name, temperature.get("figures"), temperature.get("gap_closed")))
    rows.append(_figure_row("teacher", evaluation.get("teacher"), None))
    return rows


def text_note(evaluation: Record) -> str:
    """On what the figures were measured."""
    student = part_of(evaluation, "student")
    if not student:
        return ""
    temperature = part_of(evaluation, "temperature_control")
    texts = ", ".join(Path(str(text)).name for text in evaluation.get("texts") or ())
    parts = [
        f"{student.get('tokens', 0):,} predicted tokens of held-out text{f' ({texts})' if texts else ''}",
        f"sequences of {evaluation['sequence_length']} tokens" if evaluation.get("sequence_length") else "",
        f"± is one standard error over {student.get('documents', '?')} {evaluation.get('unit', 'documents')}",
        f"the temperature was fitted on {temperature.get('fitted_on', '?')} and measured on the rest"
        if temperature
        else "",
    ]
    left_out = part_of(evaluation, "held_out")
    counts = [
        int(left_out.get(key) or 0) for key in ("documents_used", "documents_of_used_groups", "documents_repeated")
    ]
    if sum(counts):
        parts.append(
            f"{counts[0]} documents left out that it was made on, {counts[1]} of the same sources, {counts[2]} that "
            "mostly repeat them"
        )
    if left_out.get("groups_apart") is False:
        parts.append("of the sources it was made on")
    if part_of(evaluation, "domain").get("different"):
        parts.append("calibrated on text of another domain")
    return ", ".join(part for part in parts if part) + "; intervals and whiskers are 95 %; all in nats per token."


def fate_counts(record: Record) -> list[tuple[str, int]]:
    """Why tensors were left as they are, most frequent first."""
    kept = (tensor for tensor in tensors(record) if tensor.get("fate") != "lora")
    return Counter(str(tensor.get("reason") or "no reason recorded") for tensor in kept).most_common()


def unused_counts(record: Record) -> list[tuple[str, int, str]]:
    """Why teacher tensors were not used: reason, how many, and one of them; most frequent first."""
    unused = part_of(record, "unused_teacher_tensors")
    counts = Counter(str(reason) for reason in unused.values()).most_common()
    return [(reason, count, next(n for n, r in unused.items() if str(r) == reason)) for reason, count in counts]


def tensors(record: Record) -> Sequence[Record]:
    """The record of every student tensor."""
    return record.get("tensors") or ()


def lora_count(record: Record) -> int:
    """Tensors that carry a delta."""
    return sum(tensor.get("fate") == "lora" for tensor in tensors(record))


def ranks(record: Record) -> dict[str, tuple[int, int]]:
    """Lowest and highest rank of body and head."""
    found: dict[str, list[int]] = {}
    for tensor in tensors(record):
        if tensor.get("fate") == "lora" and tensor.get("rank"):
            found.setdefault("head" if tensor.get("role") == "head" else "body", []).append(int(tensor["rank"]))
    return {part: (min(values), max(values)) for part, values in sorted(found.items())}


def serving_rank(record: Record) -> int:
    """The highest rank a server meets; gate and up of experts are one module there and their ranks add up."""
    return max(
        (
            int(tensor["rank"]) * (2 if str(tensor.get("role")).startswith("experts.") else 1)
            for tensor in tensors(record)
            if tensor.get("rank")
        ),
        default=0,
    )


def vllm_rank(record: Record) -> int | None:
    """What to give vLLM as --max-lora-rank; None if the rank is beyond what it takes."""
    return next((rank for rank in VLLM_RANKS if rank >= serving_rank(record)), None)


def grid(record: Record, field: str) -> Grid | None:
    """Mean of a field over the tensors of each role in each layer; None if no tensor has it."""
    cells: dict[tuple[str, str], list[float]] = {}
    roles: dict[str, None] = {}
    layers: set[int] = set()
    ends = False
    for tensor in tensors(record):
        role, layer, value = str(tensor.get("role") or "?"), tensor.get("layer"), tensor.get(field)
        if tensor.get("fate") != "lora":
            continue
        roles.setdefault(role)
        ends = ends or layer is None
        if layer is not None:
            layers.add(int(layer))
        if isinstance(value, int | float):
            cells.setdefault((role, ENDS if layer is None else str(layer)), []).append(float(value))
    if not cells:
        return None
    columns = (*(str(layer) for layer in sorted(layers)), *((ENDS,) if ends else ()))
    values = tuple(tuple(_mean(cells.get((role, column), ())) for column in columns) for role in roles)
    return Grid(tuple(roles), columns, values)


def depth_edges(record: Record) -> list[tuple[int, int, float]]:
    """Student layer, teacher layer and weight of every arrow of the depth map."""
    return [
        (int(student), int(teacher), float(weight))
        for student, blend in record.get("depth_map") or ()
        for teacher, weight in blend
    ]


def number(value: Any, digits: int = 4) -> str:
    """A number to show, or a dash."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "–"


def _figure_row(name: str, figures: Record | None, gap: Record | None) -> FigureRow:
    found = figures or {}
    agreement = found.get("top1_agreement")
    cells = (
        with_error(found.get("kl"), found.get("kl_error")) + _interval(found.get("kl_interval")),
        with_error(found.get("cross_entropy"), found.get("cross_entropy_error"))
        + _interval(found.get("cross_entropy_interval")),
        number(found.get("perplexity"), 2),
        f"{agreement:.1%}" if isinstance(agreement, int | float) else "–",
        _gap(gap, "kl"),
        _gap(gap, "cross_entropy"),
    )
    return FigureRow(name, cells)


def _gap(gap: Record | None, field: str) -> str:
    if gap is None:
        return ""
    value, interval = gap.get(field), gap.get(f"{field}_interval")
    if not isinstance(value, int | float):
        return "–"
    within = f" ({interval['low']:+.1f} … {interval['high']:+.1f})" if interval else ""
    return f"{value:+.1f} %{within}"


def _interval(interval: Record | None) -> str:
    return f" ({interval['low']:.3f} … {interval['high']:.3f})" if interval and interval["high"] else ""


def with_error(value: Any, error: Any, sign: str = "") -> str:
    """A number with its standard error, where there is one."""
    shown = f"{value:{sign}.4f}" if isinstance(value, int | float) else number(value)
    return f"{shown} ± {error:.4f}" if isinstance(error, int | float) and error > 0 else shown


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def part_of(record: Record, key: str) -> Record:
    """A part of a record; empty where it is absent."""
    part = record.get(key)
    return part if isinstance(part, Mapping) else {}
