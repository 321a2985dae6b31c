"""One self-contained page about a run: figures, pictures, and what was done to which tensors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from moe_svd_distill.evaluation.guard import TrialFigures
from moe_svd_distill.report import facts, figures
from moe_svd_distill.report.figures import Cell, number
from moe_svd_distill.report.record import EvaluationRecord, ModelRecord, RunRecord

_TEMPLATES = Path(__file__).parent / "templates"
_TRIAL_COLUMNS = ("scale", "KL", "falls by", "cross-entropy", "falls by")
_FIRST_COLUMNS, _OTHER_COLUMNS = (0, 1, 2, 3, 4), (0, 5, 6)
_WRITERS = {
    "student": "student",
    "adapted": "with this adapter",
    "teacher": "teacher",
    "text": "the text itself",
}


def html_report(record: RunRecord) -> str:
    """Draw the page of a run, with its figures once the adapter has been evaluated."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    evaluation, content = record.evaluation, record.content
    page = environment.get_template("report.html").render(
        teacher=facts.model_name(record, "teacher"),
        student=facts.model_name(record, "student"),
        headline=facts.headline(record),
        tone=_tone(record),
        columns=figures.FIGURE_COLUMNS,
        rows=figures.figure_rows(evaluation),
        first_columns=_FIRST_COLUMNS,
        other_columns=_OTHER_COLUMNS,
        text_note=figures.text_note(evaluation),
        benchmark_columns=figures.BENCHMARK_COLUMNS,
        benchmarks=figures.benchmark_rows(evaluation),
        benchmark_notes=figures.benchmark_notes(evaluation),
        continuations=_continuations(evaluation),
        not_written=evaluation.on_text.continuations.skipped if evaluation and evaluation.on_text else {},
        notes=evaluation.held_out.notes if evaluation else (),
        training=facts.training_note(record),
        decision=facts.decision(record),
        trial_columns=_TRIAL_COLUMNS,
        trials=[_trial(trial) for trial in record.scale_search.trials],
        models=[("teacher", _sizes(record.teacher)), ("student", _sizes(record.student))],
        lora=facts.lora_count(record),
        total=len(record.tensors),
        ranks=facts.ranks(record),
        kept=facts.fate_counts(record),
        unused=facts.unused_counts(record),
        recipe=_dump(content.get("recipe")),
        execution=_dump({key: content[key] for key in ("execution", "timing", "versions") if key in content}),
        pictures=_pictures(record),
        finished=record.finished or "",
        digest=record.adapter_sha256 or "",
    )
    return str(page)


def _continuations(evaluation: EvaluationRecord | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each passage with who wrote what behind it."""
    if evaluation is None or evaluation.on_text is None:
        return []
    written = evaluation.on_text.continuations
    return [
        (
            prompt,
            [(words, written.texts[who][n]) for who, words in _WRITERS.items() if n < len(written.texts.get(who, ()))],
        )
        for n, prompt in enumerate(written.prompts)
    ]


def _pictures(record: RunRecord) -> dict[str, str]:
    """What the record has figures for, as elements of the page that say in words what they show."""
    from moe_svd_distill.report import pictures

    drawn = {
        "figures": (
            pictures.figures_picture(record.evaluation),
            "KL and cross-entropy before, after and of the controls",
        ),
        "fit": (
            pictures.fit_picture(record.calibration),
            "KL on calibration text after each pass of the fit, the pass that was kept marked",
        ),
        "training": (
            pictures.curve_picture(record.refinement),
            "Training loss and KL on calibration text by tokens trained on, the state that was kept marked",
        ),
        "scale": (pictures.scale_picture(record.scale_search), "Fall of KL and cross-entropy at each scale"),
        "delta": (
            pictures.heat_picture(facts.grid(record, "relative_delta"), "Size of the change: ‖ΔW‖ / ‖W‖"),
            "Size of the change in each role and layer",
        ),
        "residual": (
            pictures.heat_picture(facts.grid(record, "residual"), "Left out by the rank: ‖ΔW − BA‖ / ‖ΔW‖"),
            "What the rank leaves out in each role and layer",
        ),
        "similarity": (
            pictures.heat_picture(facts.grid(record, "matched_similarity"), "Likeness of matched neurons and heads"),
            "How alike matched neurons, heads or experts are",
        ),
        "depth": (
            pictures.depth_picture(facts.depth_edges(record), (record.student.layers, record.teacher.layers)),
            "The depth map",
        ),
    }
    return {name: _inline(name, content, words) for name, (content, words) in drawn.items() if content is not None}


def _inline(name: str, picture: bytes, words: str) -> str:
    """An SVG within the page, so that it takes the page's colours, under identifiers that no other picture has."""
    from markupsafe import escape

    text = picture.decode("utf-8")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text[text.find("<svg") :])
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)


def _code(text: str) -> str:
    """Text in the page, with what stands between back-ticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _tone(record: RunRecord) -> str:
    if record.evaluation is not None and record.evaluation.effect:
        return {"helps": "good", "harms": "bad"}.get(record.evaluation.effect, "neutral")
    return "bad" if facts.nothing_kept(record) == "harm" else "neutral"


def _trial(trial: TrialFigures) -> tuple[Cell, ...]:
    scales = trial.scales
    same = len(set(scales.values())) == 1
    named = "all " + f"{next(iter(scales.values())):g}" if same else ", ".join(f"{g} {s:g}" for g, s in scales.items())
    falls = ((trial.kl_fall, trial.kl_fall_error), (trial.cross_entropy_fall, trial.cross_entropy_fall_error))
    kl, entropy = (Cell(number(fall), f"± {error:.4f}" if math.isfinite(error) else "") for fall, error in falls)
    return Cell(named), Cell(number(trial.kl)), kl, Cell(number(trial.cross_entropy)), entropy


def _sizes(model: ModelRecord) -> list[tuple[str, str]]:
    sizes = {"layers": model.layers, "hidden": model.hidden, "experts": model.experts, "vocabulary": model.vocabulary}
    pairs = [("architecture", model.family)] if model.family else []
    pairs += [(name, f"{size:,}") for name, size in sizes.items() if size]
    return [*pairs, ("weights", _size(model.bytes))] if model.bytes else pairs


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) if value else ""
