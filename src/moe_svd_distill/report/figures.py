"""What an evaluation found, as rows and notes for pages and terminal: figures on held-out text, and benchmarks."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from moe_svd_distill.algebra.figures import Figures, Interval
from moe_svd_distill.evaluation.code.result import CodeBenchmark
from moe_svd_distill.evaluation.uncertainty import GapClosed
from moe_svd_distill.report.record import EvaluationRecord

FIGURE_COLUMNS = (
    "",
    "KL",
    "cross-entropy",
    "KL gap closed",
    "cross-entropy gap closed",
    "top-1 agreement",
    "perplexity",
)
BENCHMARK_COLUMNS = ("benchmark", "student", "with this adapter", "change")
_ERRORS_SHOWN = 3


class Cell(NamedTuple):
    """A figure, and its 95 % interval or else its standard error."""

    value: str
    within: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.within})" if self.within else self.value


def figure_rows(evaluation: EvaluationRecord | None) -> list[tuple[Cell, ...]]:
    """The table of figures: untouched student, adapter, controls, teacher; who was measured, then the columns."""
    found = evaluation.on_text if evaluation else None
    if found is None:
        return []
    rows = [
        _figure_row("student", found.student),
        _figure_row("with this adapter", found.adapted, found.gap_closed),
    ]
    for control in found.controls:
        rows.append(_figure_row(f"random, seed {control.seed}", control.figures, control.gap_closed))
    temperature = found.temperature_control
    if temperature:
        name = f"temperature {number(temperature.temperature, 3)}"
        rows.append(_figure_row(name, temperature.figures, temperature.gap_closed))
    return [*rows, _figure_row("teacher", found.teacher)]


def text_note(evaluation: EvaluationRecord | None) -> str:
    """On what the figures were measured."""
    found = evaluation.on_text if evaluation else None
    if evaluation is None or found is None:
        return ""
    student, temperature, left_out = found.student, found.temperature_control, evaluation.held_out
    texts = ", ".join(Path(text).name for text in evaluation.texts)
    controls = ["random: a random change of the adapter's size"] if found.controls else []
    if temperature:
        controls.append(
            "temperature: one temperature on the student's logits alone, fitted on "
            f"{temperature.fitted_on} and measured on the rest"
        )
    parts = [
        f"{student.tokens:,} predicted tokens of held-out text{f' ({texts})' if texts else ''}",
        f"sequences of {found.sequence_length} tokens" if found.sequence_length else "",
        f"± is one standard error over {student.documents} {found.unit}",
    ]
    if left_out.anything:
        repeated = left_out.documents_repeated
        parts.append(
            f"{left_out.documents_used} documents left out that it was made on, "
            f"{left_out.documents_of_used_groups} of the same sources, "
            f"{'an unknown number' if repeated is None else repeated} that mostly repeat them"
        )
    if not left_out.groups_apart:
        parts.append("of the sources it was made on")
    if found.domain is not None and found.domain.different:
        parts.append("calibrated on text of another domain")
    measured = ", ".join(part for part in parts if part)
    ends = ("intervals and whiskers are 95 %", "KL and cross-entropy in nats per token")
    return "; ".join((*controls, measured, *ends)) + "."


def benchmark_rows(evaluation: EvaluationRecord | None) -> list[tuple[Cell, ...]]:
    """Benchmark and metric, untouched student, with the adapter, change."""
    if evaluation is None:
        return []
    harness: list[tuple[Cell, ...]] = [
        (
            Cell(f"{score.task}, {score.metric}" + ("" if score.filter == "none" else f" ({score.filter})")),
            _with_error(score.student, score.student_error),
            _with_error(score.adapted, score.adapted_error),
            _with_error(score.change, score.change_error, "+"),
        )
        for score in (evaluation.benchmarks.scores if evaluation.benchmarks else ())
    ]
    code: list[tuple[Cell, ...]] = [
        (
            Cell(f"{name}, pass@1"),
            Cell(number(found.student.pass_at_1)),
            Cell(number(found.adapted.pass_at_1)),
            Cell(
                number(found.change.change, sign="+"),
                _interval(found.change.low, found.change.high, 4) if math.isfinite(found.change.low) else "",
            ),
        )
        for name, found in evaluation.code_benchmarks.items()
    ]
    return harness + code


NO_TASKS = (
    "Tasks were not measured: next-token figures do not say whether the student still solves them. "
    "`moe-svd-distill evaluate OUT --benchmark humaneval --run-generated-code` does."
)


def benchmark_notes(evaluation: EvaluationRecord | None) -> list[str]:
    """How the benchmarks were run, or that none was."""
    if evaluation is None:
        return []
    found = evaluation.benchmarks
    scored = found is not None and found.scores
    if not scored and not evaluation.code_benchmarks:
        return [NO_TASKS]
    harness = []
    if found is not None and scored:
        limit = f", at most {found.limit} examples of each task" if found.limit else ""
        harness = [
            f"By lm-evaluation-harness {found.harness} in {found.dtype}{limit}; ± is "
            "one standard error, that of the change paired over examples."
        ]
    return harness + [code_note(found) for found in evaluation.code_benchmarks.values()]


def code_note(found: CodeBenchmark) -> str:
    """How programming problems were completed and run, and what became of those that failed."""
    network = "no network" if found.guards.network else "the network within reach"
    files = "their own folder" if found.guards.files else "whatever their user may change"
    p_value = number(found.change.p_value, 3)
    parts = [
        f"{found.name}: {found.problems} problems of {found.source}, one greedy completion each of the plain "
        f"prompt in {found.settings.dtype}, at most {found.settings.limit} tokens",
        "" if found.teacher is None else f"the teacher passes {number(found.teacher.pass_at_1)}",
        f"{len(found.gained)} problems gained and {len(found.lost)} lost, McNemar's exact p {p_value}",
        "the interval is 95 %, exact and paired over problems",
        _failures(found),
        f"programs had {network} and could change {files}",
    ]
    return "; ".join(part for part in parts if part) + "."


def number(value: float, digits: int = 4, sign: str = "") -> str:
    """A number to show, or a dash."""
    return with_minus(f"{value:{sign}.{digits}f}") if math.isfinite(value) else "–"


def with_minus(text: str) -> str:
    """Text with a minus sign, not a hyphen, before its negative figures, as the pictures have it."""
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)


def _failures(found: CodeBenchmark) -> str:
    adapted = found.adapted
    if not adapted.reasons:
        return ""
    common = sorted(adapted.reasons.items(), key=lambda item: (-item[1], item[0]))[:_ERRORS_SHOWN]
    named = ", ".join(f"{reason} {count}" for reason, count in common)
    return f"the adapted student's failures are mostly {named}, and {adapted.unfinished} met the limit"


def _figure_row(name: str, figures: Figures, gap: GapClosed | None = None) -> tuple[Cell, ...]:
    gaps = (
        (Cell(""), Cell(""))
        if gap is None
        else (_percent(gap.kl, gap.kl_interval), _percent(gap.cross_entropy, gap.cross_entropy_interval))
    )
    return (
        Cell(name),
        _with_interval(figures.kl, figures.kl_error, figures.kl_interval),
        _with_interval(figures.cross_entropy, figures.cross_entropy_error, figures.cross_entropy_interval),
        *gaps,
        Cell(f"{figures.top1_agreement:.1%}" if math.isfinite(figures.top1_agreement) else "–"),
        Cell(number(figures.perplexity, 2)),
    )


def _percent(value: float | None, interval: Interval | None) -> Cell:
    within = _interval(interval.low, interval.high, 1) if interval else ""
    return Cell("–" if value is None else f"{number(value, 1, '+')} %", within)


def _interval(low: float, high: float, digits: int) -> str:
    return f"{number(low, digits, '+')} … {number(high, digits, '+')}"


def _with_interval(value: float, error: float, interval: Interval | None) -> Cell:
    if interval and interval.high:
        return Cell(number(value), f"{interval.low:.3f} … {interval.high:.3f}")
    return _with_error(value, error)


def _with_error(value: float, error: float | None, sign: str = "") -> Cell:
    known = math.isfinite(value) and error is not None and error > 0
    return Cell(number(value, sign=sign), f"± {error:.4f}" if known else "")
