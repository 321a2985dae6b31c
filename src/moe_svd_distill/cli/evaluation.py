"""What an evaluation found, as tables on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from moe_svd_distill.algebra.figures import Figures, Interval
from moe_svd_distill.cli.screen import print_line, print_table
from moe_svd_distill.evaluation.code.result import CodeBenchmark
from moe_svd_distill.evaluation.result import Benchmarks, Evaluation
from moe_svd_distill.evaluation.uncertainty import GapClosed
from moe_svd_distill.report.figures import code_note
from moe_svd_distill.report.record import EvaluationRecord, LeftOut

_Measured: TypeAlias = tuple[str, Figures, GapClosed | None]
"""What it is, its figures, and the gaps it closes."""


def show(title: str, evaluation: EvaluationRecord) -> None:
    """The figures and the benchmarks as tables, and the verdict."""
    if evaluation.on_text:
        _show_figures(title, evaluation.on_text, evaluation.held_out)
        print_line(evaluation.verdict)
    if evaluation.benchmarks:
        _show_benchmarks(title, evaluation.benchmarks)
    if evaluation.code_benchmarks:
        _show_code_benchmarks(title, evaluation.code_benchmarks)


def _show_figures(title: str, found: Evaluation, left_out: LeftOut) -> None:
    temperature = found.temperature_control
    on_half = temperature is not None and temperature.fitted_on != "calibration text"
    measured: list[_Measured] = [
        ("student", found.student, None),
        ("with the adapter", found.adapted, found.gap_closed),
        *((f"random, seed {control.seed}", control.figures, control.gap_closed) for control in found.controls),
    ]
    if temperature:
        name = f"temperature {temperature.temperature:.3f}{'*' if on_half else ''}"
        measured.append((name, temperature.figures, temperature.gap_closed))
    measured.append(("teacher", found.teacher, None))
    columns = ("", "KL", "CE", "top-1", "KL gap closed", "CE gap closed")
    print_table(f"{title}: {found.student.tokens:,} held-out tokens", columns, map(_figures_row, measured))
    intervals = [row for row in map(_intervals_row, measured) if any(row[1:])]
    print_table(
        f"95 % intervals, by bootstrap over {found.unit}", ("", "KL", "CE", "KL gap, %", "CE gap, %"), intervals
    )
    notes = ["KL: from the teacher's distribution, CE: cross-entropy, both in nats per token."]
    if found.controls:
        notes.append("random: a random change of the same size.")
    if temperature:
        half = ", fitted on half of the text and measured on the other half" if on_half else ""
        notes.append(f"temperature: one temperature on the student's logits alone{half}.")
    if left_out.anything:
        repeated = left_out.documents_repeated
        notes.append(
            f"Left out: {left_out.documents_used} documents the adapter was made on, "
            f"{left_out.documents_of_used_groups} of the same sources, "
            f"{'an unknown number of' if repeated is None else repeated} that mostly repeat them."
        )
    notes += [f"Held-out text: {note}." for note in left_out.notes]
    print_line("\n" + "\n".join(notes))


def _show_benchmarks(title: str, found: Benchmarks) -> None:
    rows = [
        (
            f"{score.task}: {score.metric}" + ("" if score.filter == "none" else f" ({score.filter})"),
            "" if score.examples is None else f"{score.examples:,}",
            f"{score.student:.4f}",
            f"{score.adapted:.4f}",
            f"{score.change:+.4f}" + ("" if score.change_error is None else f" ± {score.change_error:.4f}"),
        )
        for score in found.scores
    ]
    limited = "" if found.limit is None else f", at most {found.limit} examples of each task"
    columns = ("", "examples", "student", "with the adapter", "change")
    print_table(f"{title}: lm-evaluation-harness {found.harness}{limited}", columns, rows)


def _show_code_benchmarks(title: str, found: Mapping[str, CodeBenchmark]) -> None:
    rows = [
        (
            name,
            f"{result.problems:,}",
            f"{result.student.pass_at_1:.4f}",
            f"{result.adapted.pass_at_1:.4f}",
            f"{result.change.change:+.4f}",
            f"{result.change.low:+.4f} … {result.change.high:+.4f}",
            f"{result.teacher.pass_at_1:.4f}" if result.teacher else "-",
        )
        for name, result in found.items()
    ]
    columns = ("", "problems", "student", "adapter", "change", "95 %", "teacher")
    print_table(f"{title}: pass@1", columns, rows)
    for result in found.values():
        print_line(code_note(result))


def _figures_row(measured: _Measured) -> tuple[str, ...]:
    name, figures, gap = measured

    def percent(closed: float | None) -> str:
        return "-" if closed is None else f"{closed:+.1f} %"

    return (
        name,
        f"{figures.kl:.4f}",
        f"{figures.cross_entropy:.4f}",
        f"{figures.top1_agreement:.1%}",
        "" if gap is None else percent(gap.kl),
        "" if gap is None else percent(gap.cross_entropy),
    )


def _intervals_row(measured: _Measured) -> tuple[str, ...]:
    name, figures, gap = measured
    return (
        name,
        _interval(figures.kl_interval if figures.kl else None, ".3f"),
        _interval(figures.cross_entropy_interval, ".2f"),
        _interval(gap.kl_interval if gap else None, "+.1f"),
        _interval(gap.cross_entropy_interval if gap else None, "+.1f"),
    )


def _interval(interval: Interval | None, digits: str) -> str:
    return "" if interval is None else f"{interval.low:{digits}} … {interval.high:{digits}}"
