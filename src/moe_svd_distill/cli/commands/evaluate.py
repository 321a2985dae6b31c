"""evaluate: what an adapter does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from moe_svd_distill.cli.options import json_option


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
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@json_option
def command(
    folder: Path,
    teacher: str | None,
    student: str | None,
    texts: tuple[Path, ...],
    tokens: int,
    controls: int,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure the adapter in FOLDER on held-out text.

    Prints KL(teacher‖student), cross-entropy and top-1 agreement of the untouched student, of the student with the
    adapter as PEFT loads it, and of a random delta of equal norm.
    """
    from moe_svd_distill.cli.screen import Monitor, print_json
    from moe_svd_distill.errors import MissingInputError
    from moe_svd_distill.pipeline.evaluate import evaluate_adapter

    if not folder.is_dir():
        raise MissingInputError(f"{folder} is not a folder", "Give the folder of an adapter")
    with Monitor(quiet=as_json) as monitor:
        result = evaluate_adapter(
            folder,
            teacher,
            student,
            texts,
            tokens=tokens,
            seed=seed,
            device=_device(device),
            controls=controls,
            on_progress=lambda name, done, total: monitor.on_stage(f"reading: {name}", done / total),
        )
    if as_json:
        print_json(result.evaluation)
        return
    show(str(folder), result.evaluation)
    if result.report:
        click.echo(f"Report: {result.report}")


def show(title: str, evaluation: Mapping[str, Any]) -> None:
    """The figures as a table, and the verdict."""
    from moe_svd_distill.cli.screen import output, print_table

    rows = [
        _row("student, untouched", evaluation["student"], None),
        _row("student with the adapter", evaluation["adapted"], evaluation["gap_closed"]),
    ]
    rows += [
        _row(f"random delta of equal norm, seed {control['seed']}", control["figures"], control["gap_closed"])
        for control in evaluation["controls"]
    ]
    rows.append(_row("teacher", evaluation["teacher"], None))
    columns = ("", "KL to teacher", "cross-entropy", "top-1 agreement", "KL gap closed", "CE gap closed")
    print_table(f"{title}: {evaluation['student']['tokens']:,} held-out tokens", columns, rows)
    output.print(evaluation["verdict"], soft_wrap=True, highlight=False)


def _row(name: str, figures: Mapping[str, Any], gap: Mapping[str, Any] | None) -> tuple[str, ...]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:+.1f} %"

    return (
        name,
        f"{figures['kl']:.4f}",
        f"{figures['cross_entropy']:.4f}",
        f"{figures['top1_agreement']:.1%}",
        "" if gap is None else percent(gap["kl"]),
        "" if gap is None else percent(gap["cross_entropy"]),
    )


def _device(asked: str) -> str:
    if asked != "auto":
        return asked
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"
