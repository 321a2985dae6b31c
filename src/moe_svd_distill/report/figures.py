"""What an evaluation found, as rows and notes for pages and terminal: figures on held-out text, and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from moe_svd_distill.algebra.figures import Interval
from moe_svd_distill.evaluation.uncertainty import GapClosed
from moe_svd_distill.report.record import CodeRecord, EvaluationRecord, FiguresRecord

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
    if evaluation is None or evaluation.student is None:
        return []
    rows = [
        _figure_row("student", evaluation.student),
        _figure_row("with this adapter", evaluation.adapted, evaluation.gap_closed),
    ]
    for control in evaluation.controls:
        rows.append(_figure_row(f"random, seed {_known(control.seed)}", control.figures, control.gap_closed))
    temperature = evaluation.temperature_control
    if temperature:
        name = f"temperature {number(temperature.temperature, 3)}"
        rows.append(_figure_row(name, temperature.figures, temperature.gap_closed))
    return [*rows, _figure_row("teacher", evaluation.teacher)]


def text_note(evaluation: EvaluationRecord | None) -> str:
    """On what the figures were measured."""
    if evaluation is None or evaluation.student is None:
        return ""
    student, temperature = evaluation.student, evaluation.temperature_control
    texts = ", ".join(Path(text).name for text in evaluation.texts)
    controls = ["random: a random change of the adapter's size"] if evaluation.controls else []
    if temperature:
        controls.append(
            "temperature: one temperature on the student's logits alone, fitted on "
            f"{temperature.fitted_on} and measured on the rest"
        )
    parts = [
        f"{student.tokens:,} predicted tokens of held-out text{f' ({texts})' if texts else ''}",
        f"sequences of {evaluation.sequence_length} tokens" if evaluation.sequence_length else "",
        f"± is one standard error over {_known(student.documents)} {evaluation.unit}",
    ]
    used, of_groups, repeated = (
        evaluation.documents_used or 0,
        evaluation.documents_of_used_groups or 0,
        evaluation.documents_repeated,
    )
    if used or of_groups or repeated:
        parts.append(
            f"{used} documents left out that it was made on, {of_groups} of the same sources, "
            f"{'an unknown number' if repeated is None else repeated} that mostly repeat them"
        )
    if evaluation.groups_apart is False:
        parts.append("of the sources it was made on")
    if evaluation.other_domain:
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
        for score in evaluation.scores
    ]
    code: list[tuple[Cell, ...]] = [
        (
            Cell(f"{name}, pass@1"),
            Cell(number(found.student)),
            Cell(number(found.adapted)),
            Cell(
                "–" if found.change is None else f"{found.change:+.4f}",
                "" if found.low is None or found.high is None else f"{found.low:+.4f} … {found.high:+.4f}",
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
    if not evaluation.scores and not evaluation.code_benchmarks:
        return [NO_TASKS]
    harness = []
    if evaluation.scores:
        limit = f", at most {evaluation.score_limit} examples of each task" if evaluation.score_limit else ""
        harness = [
            f"By lm-evaluation-harness {_known(evaluation.harness)} in {_known(evaluation.score_dtype)}{limit}; ± is "
            "one standard error, that of the change paired over examples."
        ]
    return harness + [code_note(found) for found in evaluation.code_benchmarks.values()]


def code_note(found: CodeRecord) -> str:
    """How programming problems were completed and run, and what became of those that failed."""
    network = "no network" if found.without_network else "the network within reach"
    files = "their own folder" if found.files_guarded else "whatever their user may change"
    parts = [
        f"{found.name}: {_known(found.problems)} problems of {found.source}, one greedy completion each of the plain "
        f"prompt in {_known(found.dtype)}, at most {_known(found.token_limit)} tokens",
        "" if found.teacher is None else f"the teacher passes {number(found.teacher)}",
        f"{len(found.gained)} problems gained and {len(found.lost)} lost, McNemar's exact p {number(found.p_value, 3)}",
        "the interval is 95 %, exact and paired over problems",
        _failures(found),
        f"programs had {network} and could change {files}",
    ]
    return "; ".join(part for part in parts if part) + "."


def number(value: float | None, digits: int = 4) -> str:
    """A number to show, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def _failures(found: CodeRecord) -> str:
    if not found.reasons:
        return ""
    common = sorted(found.reasons.items(), key=lambda item: (-item[1], item[0]))[:_ERRORS_SHOWN]
    named = ", ".join(f"{reason} {count}" for reason, count in common)
    return f"the adapted student's failures are mostly {named}, and {_known(found.unfinished)} met the limit"


def _figure_row(name: str, figures: FiguresRecord | None, gap: GapClosed | None = None) -> tuple[Cell, ...]:
    gaps = (
        (Cell(""), Cell(""))
        if gap is None
        else (_percent(gap.kl, gap.kl_interval), _percent(gap.cross_entropy, gap.cross_entropy_interval))
    )
    if figures is None:
        return (Cell(name), Cell("–"), Cell("–"), *gaps, Cell("–"), Cell("–"))
    return (
        Cell(name),
        _with_interval(figures.kl, figures.kl_error, figures.kl_interval),
        _with_interval(figures.cross_entropy, figures.cross_entropy_error, figures.cross_entropy_interval),
        *gaps,
        Cell("–" if figures.top1_agreement is None else f"{figures.top1_agreement:.1%}"),
        Cell(number(figures.perplexity, 2)),
    )


def _percent(value: float | None, interval: Interval | None) -> Cell:
    return Cell(
        "–" if value is None else f"{value:+.1f} %", f"{interval.low:+.1f} … {interval.high:+.1f}" if interval else ""
    )


def _with_interval(value: float | None, error: float | None, interval: Interval | None) -> Cell:
    if interval and interval.high:
        return Cell(number(value), f"{interval.low:.3f} … {interval.high:.3f}")
    return _with_error(value, error)


def _with_error(value: float | None, error: float | None, sign: str = "") -> Cell:
    if value is None:
        return Cell("–")
    return Cell(f"{value:{sign}.4f}", f"± {error:.4f}" if error is not None and error > 0 else "")


def _known(value: Any) -> Any:
    return "?" if value is None else value
