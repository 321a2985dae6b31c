"""evaluate: what an adapter does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import click

from moe_svd_distill.cli.options import Shown, shown_options

_Measured: TypeAlias = tuple[str, Mapping[str, Any], Mapping[str, Any] | None]
"""What it is, its figures, and the gaps it closes."""

if TYPE_CHECKING:
    from moe_svd_distill.calibration.paired import VocabularyMode
    from moe_svd_distill.evaluation.loading import Mode


@click.command("evaluate", short_help="Measure what an adapter does.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--teacher", help="Folder or hub id of the teacher; default: the one the adapter was made from.")
@click.option("--student", help="Folder or hub id of the student; default: the one the adapter was made for.")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), help="Held-out text; repeatable.")
@click.option(
    "--tokens", type=click.IntRange(min=512), default=50_000, show_default=True, help="Tokens to read at most."
)
@click.option("--controls", type=click.IntRange(min=0), default=1, show_default=True, help="Random deltas to measure.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--mode",
    type=click.Choice(["auto", "resident", "streamed"]),
    default="auto",
    show_default=True,
    help="Models in memory, or one layer at a time; auto: in memory where they fit.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the states of streamed models; default: FOLDER/cache.",
)
@click.option(
    "--vocabulary",
    type=click.Choice(["equal", "shared"]),
    help="shared: compare models with different tokenizers on what both have; default: as the adapter was made.",
)
@click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    help="humaneval; humaneval:FILE for problems of your own in its format; or tasks of the lm-evaluation-harness. "
    "NAME[,NAME]; repeatable.",
)
@click.option("--benchmark-limit", type=click.IntRange(min=1), help="Examples of each task at most, for a first look.")
@click.option(
    "--benchmark-include-path",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with task files (YAML) of your own.",
)
@click.option(
    "--benchmark-tokens",
    type=click.IntRange(min=1),
    default=384,
    show_default=True,
    help="humaneval: tokens of each program at most.",
)
@click.option(
    "--benchmark-batch",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="humaneval: programs that are written at a time.",
)
@click.option("--benchmark-teacher", is_flag=True, help="humaneval: the teacher as well.")
@click.option(
    "--run-generated-code",
    is_flag=True,
    help="humaneval: consent to run the programs that the models write, under limits, on this machine.",
)
@click.option("--report-to", help="Trackers: tensorboard, wandb, both with a comma, or none; default: the run's.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@shown_options
def command(
    folder: Path,
    teacher: str | None,
    student: str | None,
    texts: tuple[Path, ...],
    tokens: int,
    controls: int,
    seed: int,
    mode: str,
    cache: Path | None,
    vocabulary: str | None,
    benchmarks: tuple[str, ...],
    benchmark_limit: int | None,
    benchmark_include_path: Path | None,
    benchmark_tokens: int,
    benchmark_batch: int,
    benchmark_teacher: bool,
    run_generated_code: bool,
    report_to: str | None,
    device: str,
    shown: Shown,
) -> None:
    """Measure the adapter in FOLDER on held-out text.

    Prints KL(teacher‖student), cross-entropy and top-1 agreement of the untouched student, of the student with the
    adapter as PEFT loads it, of a random delta of equal norm, and of one temperature on the untouched student's logits.
    With --benchmark also what the student scores with and without the adapter: the share of the programming problems of
    HumanEval that it solves, or what the lm-evaluation-harness makes of it.

    Example: moe-svd-distill evaluate out --text held-out.jsonl
    """
    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.cli.screen import print_json, print_line, print_next
    from moe_svd_distill.errors import MissingInputError, UsageError
    from moe_svd_distill.pipeline.evaluate import BenchmarkRequest, EvaluationRequest, evaluate_adapter

    if not folder.is_dir():
        raise MissingInputError(f"{folder} is not a folder", "Give the folder of an adapter")
    tasks = tuple(task.strip() for named in benchmarks for task in named.split(",") if task.strip())
    options = (benchmark_limit, benchmark_include_path, benchmark_teacher, run_generated_code)
    if not tasks and (benchmarks or any(options)):
        raise UsageError("no benchmark is named", "Give --benchmark TASK")
    asked = BenchmarkRequest(
        tasks,
        limit=benchmark_limit,
        include_path=benchmark_include_path,
        run_generated_code=run_generated_code,
        new_tokens=benchmark_tokens,
        batch=benchmark_batch,
        teacher=benchmark_teacher,
    )
    request = EvaluationRequest(
        folder,
        teacher,
        student,
        texts,
        asked if tasks else None,
        tokens=tokens,
        seed=seed,
        controls=controls,
        device=device,
        mode=cast("Mode", mode),
        cache=cache,
        vocabulary=cast("VocabularyMode | None", vocabulary),
        report_to=None if report_to is None else _trackers(report_to),
    )
    with Monitor(shown) as monitor:
        result = evaluate_adapter(request, monitor.on_count)
    if shown.as_json:
        print_json(result.evaluation)
        return
    show(str(folder), result.evaluation)
    if result.report:
        print_line(f"Report: {result.report}")
    if result.evaluation.get("effect") in ("harms", "none", "unproven", "mixed"):
        print_next("distill", "--help", note="with more text (--calibration, --tokens) or --preset best")
    else:
        print_next("merge", folder, "MERGED", note="unless it is served as it is")


def _trackers(text: str) -> tuple[str, ...]:
    named = (name.strip() for name in text.split(","))
    return tuple(name for name in named if name not in ("", "none"))


def show(title: str, evaluation: Mapping[str, Any]) -> None:
    """The figures and the benchmarks as tables, and the verdict."""
    if "student" in evaluation:
        _show_figures(title, evaluation)
    if evaluation.get("benchmarks"):
        _show_benchmarks(title, evaluation["benchmarks"])
    if evaluation.get("code_benchmarks"):
        _show_code_benchmarks(title, evaluation["code_benchmarks"])


def _show_figures(title: str, evaluation: Mapping[str, Any]) -> None:
    from moe_svd_distill.cli.screen import print_line, print_table

    measured: list[_Measured] = [
        ("student", evaluation["student"], None),
        ("with the adapter", evaluation["adapted"], evaluation["gap_closed"]),
    ]
    measured += [
        (f"random, seed {control['seed']}", control["figures"], control["gap_closed"])
        for control in evaluation["controls"]
    ]
    temperature = evaluation.get("temperature_control")
    if temperature:
        name = f"temperature {temperature['temperature']:.3f}{'*' if _on_half(temperature) else ''}"
        measured.append((name, temperature["figures"], temperature["gap_closed"]))
    measured.append(("teacher", evaluation["teacher"], None))
    columns = ("", "KL", "CE", "top-1", "KL gap closed", "CE gap closed")
    tokens = evaluation["student"]["tokens"]
    print_table(f"{title}: {tokens:,} held-out tokens", columns, map(_figures_row, measured))
    intervals = [row for row in map(_intervals_row, measured) if any(row[1:])]
    of_intervals = ("", "KL", "CE", "KL gap, %", "CE gap, %")
    print_table(f"95 % intervals, by bootstrap over {evaluation['unit']}", of_intervals, intervals)
    notes = ["KL: from the teacher's distribution, CE: cross-entropy, both in nats per token."]
    if evaluation["controls"]:
        notes.append("random: a random change of the same size.")
    if temperature:
        half = ", fitted on half of the text and measured on the other half" if _on_half(temperature) else ""
        notes.append(f"temperature: one temperature on the student's logits alone{half}.")
    left_out = evaluation.get("held_out") or {}
    if left_out.get("documents_used") or left_out.get("documents_of_used_groups") or left_out.get("documents_repeated"):
        repeated = left_out["documents_repeated"]
        notes.append(
            f"Left out: {left_out['documents_used']} documents the adapter was made on, "
            f"{left_out['documents_of_used_groups']} of the same sources, "
            f"{'an unknown number of' if repeated is None else repeated} that mostly repeat them."
        )
    notes += [f"Held-out text: {note}." for note in left_out.get("notes") or ()]
    print_line("\n" + "\n".join(notes))
    print_line(evaluation["verdict"])


def _show_benchmarks(title: str, benchmarks: Mapping[str, Any]) -> None:
    from moe_svd_distill.cli.screen import print_table

    rows = [
        (
            f"{score['task']}: {score['metric']}" + ("" if score["filter"] == "none" else f" ({score['filter']})"),
            "" if score["examples"] is None else f"{score['examples']:,}",
            f"{score['student']:.4f}",
            f"{score['adapted']:.4f}",
            _with_error(score["change"], score["change_error"], "+"),
        )
        for score in benchmarks["scores"]
    ]
    limited = "" if benchmarks["limit"] is None else f", at most {benchmarks['limit']} examples of each task"
    columns = ("", "examples", "student", "with the adapter", "change")
    print_table(f"{title}: lm-evaluation-harness {benchmarks['harness']}{limited}", columns, rows)


def _show_code_benchmarks(title: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    from moe_svd_distill.cli.screen import print_line, print_table
    from moe_svd_distill.report.figures import code_note
    from moe_svd_distill.report.record import CodeRecord, read_as

    rows = [
        (
            name,
            f"{result['problems']:,}",
            f"{result['student']['pass_at_1']:.4f}",
            f"{result['adapted']['pass_at_1']:.4f}",
            f"{result['change']['change']:+.4f}",
            _interval(result["change"], "+.4f"),
            f"{result['teacher']['pass_at_1']:.4f}" if result["teacher"] else "-",
        )
        for name, result in found.items()
    ]
    columns = ("", "problems", "student", "adapter", "change", "95 %", "teacher")
    print_table(f"{title}: pass@1", columns, rows)
    for result in found.values():
        print_line(code_note(read_as(CodeRecord, result)))


def _figures_row(measured: _Measured) -> tuple[str, ...]:
    name, figures, gap = measured

    def percent(field: str) -> str:
        if gap is None:
            return ""
        return "-" if gap[field] is None else f"{gap[field]:+.1f} %"

    return (
        name,
        f"{figures['kl']:.4f}",
        f"{figures['cross_entropy']:.4f}",
        f"{figures['top1_agreement']:.1%}",
        percent("kl"),
        percent("cross_entropy"),
    )


def _intervals_row(measured: _Measured) -> tuple[str, ...]:
    name, figures, gap = measured
    of_gap = gap or {}
    return (
        name,
        _interval(figures.get("kl_interval") if figures["kl"] else None, ".3f"),
        _interval(figures.get("cross_entropy_interval"), ".2f"),
        _interval(of_gap.get("kl_interval"), "+.1f"),
        _interval(of_gap.get("cross_entropy_interval"), "+.1f"),
    )


def _interval(interval: Mapping[str, float] | None, digits: str) -> str:
    return "" if interval is None else f"{interval['low']:{digits}} … {interval['high']:{digits}}"


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _on_half(temperature: Mapping[str, Any]) -> bool:
    return bool(temperature["fitted_on"] != "calibration text")
