"""evaluate: what an adapter does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from moe_svd_distill.cli.options import Number, Shown, Word, shown_options

if TYPE_CHECKING:
    from moe_svd_distill.calibration.paired import VocabularyMode
    from moe_svd_distill.evaluation.loading import Mode
    from moe_svd_distill.evaluation.request import Dtype, EvaluationOptions


@click.command("evaluate", short_help="Measure what an adapter does.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--teacher", help="Folder or hub id of the teacher; default: the one the adapter was made from.")
@click.option("--student", help="Folder or hub id of the student; default: the one the adapter was made for.")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), help="Held-out text; repeatable.")
@click.option("--tokens", type=Number(min=512), default=50_000, show_default=True, help="Tokens to read at most.")
@click.option("--controls", type=Number(min=0), default=1, show_default=True, help="Random deltas to measure.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--mode",
    type=Word(["auto", "resident", "streamed"]),
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
    type=Word(["equal", "shared"]),
    help="shared: compare models with different tokenizers on what both have; default: as the adapter was made.",
)
@click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    help="humaneval; humaneval:FILE for problems of your own in its format; or tasks of the lm-evaluation-harness. "
    "NAME[,NAME]; repeatable.",
)
@click.option("--benchmark-limit", type=Number(min=1), help="Examples of each task at most, for a first look.")
@click.option(
    "--benchmark-include-path",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with task files (YAML) of your own.",
)
@click.option(
    "--benchmark-tokens",
    type=Number(min=1),
    default=384,
    show_default=True,
    help="humaneval: tokens of each program at most.",
)
@click.option(
    "--benchmark-batch",
    type=Number(min=1),
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
@click.option(
    "--dtype",
    type=Word(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Type to compute in; auto: float32 on a CPU, bfloat16 on a GPU.",
)
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
    dtype: str,
    shown: Shown,
) -> None:
    """Measure the adapter in FOLDER on held-out text.

    Prints KL(teacher‖student), cross-entropy and top-1 agreement of the untouched student, of the student with the
    adapter as PEFT loads it, of a random delta of equal norm, and of one temperature on the untouched student's logits.
    With --benchmark also what the student scores with and without the adapter: the share of the programming problems of
    HumanEval that it solves, or what the lm-evaluation-harness makes of it.

    Example: moe-svd-distill evaluate out --text held-out.jsonl
    """
    from moe_svd_distill.cli.evaluation import show
    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.cli.screen import print_json, print_line, print_next
    from moe_svd_distill.errors import MissingInputError, UsageError
    from moe_svd_distill.evaluation.request import BenchmarkRequest
    from moe_svd_distill.pipeline.evaluate import evaluate

    if not folder.is_dir():
        raise MissingInputError(f"{folder} is not a folder", "Give the folder of an adapter")
    tasks = tuple(task.strip() for named in benchmarks for task in named.split(",") if task.strip())
    beside = (benchmark_limit, benchmark_include_path, benchmark_teacher, run_generated_code)
    if not tasks and (benchmarks or any(beside)):
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
    options: EvaluationOptions = {
        "teacher": teacher,
        "student": student,
        "benchmarks": asked if tasks else None,
        "tokens": tokens,
        "seed": seed,
        "controls": controls,
        "device": device,
        "dtype": cast("Dtype", dtype),
        "mode": cast("Mode", mode),
        "cache": cache,
        "vocabulary": cast("VocabularyMode | None", vocabulary),
        "report_to": None if report_to is None else _trackers(report_to),
    }
    with Monitor(shown) as monitor:
        result = evaluate(folder, texts, monitor.on_count, **options)
    if shown.as_json:
        print_json(result.evaluation.content)
        return
    show(str(folder), result.evaluation)
    if result.report:
        print_line(f"Report: {result.report}")
    if result.evaluation.effect in ("harms", "none", "unproven", "mixed"):
        print_next("distill", "--help", note="with more text (--calibration, --tokens) or --preset best")
    else:
        print_next("merge", folder, "MERGED", note="unless it is served as it is")


def _trackers(text: str) -> tuple[str, ...]:
    named = (name.strip() for name in text.split(","))
    return tuple(name for name in named if name not in ("", "none"))
