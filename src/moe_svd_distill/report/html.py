"""One self-contained page about a run: figures, pictures, and what was done to which tensors."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_svd_distill.report import benchmarks, facts, training
from moe_svd_distill.report.facts import Record

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        address: The file itself, as a data address.
        words: What it shows, for those who cannot see it.
    """

    address: str
    words: str


def html_report(record: Record) -> str:
    """Draw the page of a run.

    Args:
        record: The content of run.json, with ``evaluation`` in it once the adapter has been evaluated.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    evaluation, search = record.get("evaluation") or {}, record.get("scale_search") or {}
    page = environment.get_template("report.html").render(
        teacher=facts.model_name(record, "teacher"),
        student=facts.model_name(record, "student"),
        headline=facts.headline(record),
        tone=_tone(record),
        columns=facts.FIGURE_COLUMNS,
        rows=facts.figure_rows(evaluation),
        text_note=facts.text_note(evaluation),
        benchmark_columns=benchmarks.COLUMNS,
        benchmarks=benchmarks.rows(evaluation),
        benchmark_notes=benchmarks.notes(evaluation),
        training=training.training_note(record),
        decision=search.get("decision") or "",
        trials=[_trial(trial) for trial in search.get("trials") or ()],
        models=[(side, _model(record.get(side) or {})) for side in ("teacher", "student")],
        lora=facts.lora_count(record),
        total=len(facts.tensors(record)),
        ranks=facts.ranks(record),
        kept=facts.fate_counts(record),
        unused=facts.unused_counts(record),
        recipe=_dump(record.get("recipe")),
        execution=_dump({key: record[key] for key in ("execution", "timing", "versions") if key in record}),
        pictures=_pictures(record),
        finished=record.get("finished") or "",
        digest=record.get("adapter_sha256") or "",
    )
    return str(page)


def _pictures(record: Record) -> dict[str, Picture]:
    """Draw what the record has figures for."""
    from moe_svd_distill.report import pictures

    evaluation, search = record.get("evaluation") or {}, record.get("scale_search") or {}
    delta, residual = facts.grid(record, "relative_delta"), facts.grid(record, "residual")
    similarity, edges = facts.grid(record, "matched_similarity"), facts.depth_edges(record)
    drawn: dict[str, Picture] = {}

    def add(name: str, words: str, draw: Callable[[], bytes | None]) -> None:
        content = draw()
        if content is not None:
            address = f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
            drawn[name] = Picture(address, words)

    if all(evaluation.get(part) for part in ("student", "adapted", "teacher")):
        add("figures", "KL and cross-entropy before, after and of the controls",
            lambda: pictures.figures_picture(evaluation))  # fmt: skip
    add("training", "Training loss and KL on calibration text by tokens trained on, the state that was kept marked",
        lambda: pictures.curve_picture(record.get("refinement") or {}))  # fmt: skip
    add("scale", "Fall of KL and cross-entropy at each scale", lambda: pictures.scale_picture(search))
    if delta:
        add("delta", "Size of the change in each role and layer",
            lambda: pictures.heat_picture(delta, "Size of the change: ‖ΔW‖ / ‖W‖ of the student"))  # fmt: skip
    if residual:
        add("residual", "What the rank leaves out in each role and layer",
            lambda: pictures.heat_picture(residual, "Left out by the rank: ‖ΔW − BA‖ / ‖ΔW‖"))  # fmt: skip
    if similarity:
        add("similarity", "How alike matched neurons, heads or experts are",
            lambda: pictures.heat_picture(similarity, "Likeness of matched neurons and heads"))  # fmt: skip
    if edges:
        layers = _layers(record, edges)
        add("depth", "The depth map", lambda: pictures.depth_picture(edges, layers))
    return drawn


def _layers(record: Record, edges: list[tuple[int, int, float]]) -> tuple[int, int]:
    """Layers of student and teacher."""
    student = (record.get("student") or {}).get("layers") or 1 + max(edge[0] for edge in edges)
    teacher = (record.get("teacher") or {}).get("layers") or 1 + max(edge[1] for edge in edges)
    return int(student), int(teacher)


def _tone(record: Record) -> str:
    effect = (record.get("evaluation") or {}).get("effect")
    if effect:
        return {"helps": "good", "harms": "bad"}.get(str(effect), "neutral")
    return "bad" if facts.nothing_kept(record) == "harm" else "neutral"


def _trial(trial: Record) -> tuple[str, ...]:
    scales = trial.get("scales") or {}
    same = len(set(scales.values())) == 1
    named = "all " + f"{next(iter(scales.values())):g}" if same else ", ".join(f"{g} {s:g}" for g, s in scales.items())
    kl, entropy = (
        f"{facts.number(trial.get(f'{field}_fall'))} ± {facts.number(trial.get(f'{field}_fall_error'))}"
        for field in ("kl", "cross_entropy")
    )
    return named, facts.number(trial.get("kl")), kl, facts.number(trial.get("cross_entropy")), entropy


def _model(model: Record) -> list[tuple[str, str]]:
    shown = [("architecture", model.get("family")), *((key, model.get(key)) for key in ("layers", "hidden", "experts"))]
    shown.append(("vocabulary", model.get("vocabulary")))
    pairs = [(key, f"{value:,}" if isinstance(value, int) else str(value)) for key, value in shown if value]
    if model.get("bytes"):
        pairs.append(("weights", f"{model['bytes'] / 2**30:.2f} GiB"))
    return pairs


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) if value else ""
