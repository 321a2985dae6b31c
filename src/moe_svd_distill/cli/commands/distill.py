"""Making an adapter: init, distill, demo, and clean afterwards."""

from __future__ import annotations

import time
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from moe_svd_distill.cli.options import json_option, read_recipe, recipe_options

if TYPE_CHECKING:
    from moe_svd_distill.pipeline.record import Adapter
    from moe_svd_distill.recipe import Recipe

DEMO_PAIRS = ("sibling", "independent")
DEMO_EVALUATION_TOKENS = 16_000
DEMO_RECIPE = {"scale_search_tokens": 8_192, "tokens": 8_192, "copies": 3, "fit_passes": 4, "rank": 16}
_LONG = ("tensors", "units", "unused_teacher_tensors", "ignored_student_tensors")


@click.command("init", short_help="Write a recipe.")
@click.argument("teacher")
@click.argument("student")
def init_command(teacher: str, student: str) -> None:
    """Write a recipe for TEACHER and STUDENT to standard output, every key with its meaning and default."""
    from moe_svd_distill.recipe import parse_recipe, recipe_yaml

    click.echo(recipe_yaml(parse_recipe({"teacher": teacher, "student": student})), nl=False)


@click.command("distill", short_help="Make an adapter.")
@recipe_options
@json_option
def distill_command(recipe: Path | None, as_json: bool, **given: Any) -> None:
    """Make a LoRA adapter for the student from the teacher.

    Settings come from the command line, then from MOE_SVD_DISTILL_* variables, then from the RECIPE file, then from
    the preset. A run that was stopped goes on where it stopped when the same command is given again.
    """
    wanted = read_recipe(recipe, given)
    from moe_svd_distill.cli.screen import Monitor, print_json

    with Monitor(quiet=as_json) as monitor:
        adapter = _distill(wanted, monitor)
    if as_json:
        essentials = {key: value for key, value in adapter.record.content.items() if key not in _LONG}
        print_json({"output": str(adapter.folder), **essentials})
    else:
        _show(adapter)


@click.command("demo", short_help="The whole pipeline, no download.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option("--pair", "pairs", multiple=True, help="Lab pair; repeatable. Default: sibling and independent.")
@json_option
def demo_command(output: Path, pairs: tuple[str, ...], as_json: bool) -> None:
    """Distil the bundled lab pairs, evaluate the adapters on held-out text, and show what they do.

    The sibling pair shares shape and lineage, so its weights carry over, and text refines them. The independent pair
    shares nothing but the tokenizer: there the head and the last layer are fitted to the teacher on a little text.
    """
    from moe_svd_distill.cli.commands.evaluate import show as show_figures
    from moe_svd_distill.cli.screen import Monitor, print_json, print_line
    from moe_svd_distill.pipeline.evaluate import EvaluationRequest, evaluate_adapter
    from moe_svd_distill.pipeline.lab import lab_pair
    from moe_svd_distill.recipe import parse_recipe

    results: dict[str, Any] = {}
    for name in pairs or DEMO_PAIRS:
        started = time.monotonic()
        pair = lab_pair(name)
        models = {"teacher": str(pair.teacher), "student": str(pair.student), "output": output / name}
        recipe = parse_recipe({**models, "calibration": [str(pair.calibration)], **DEMO_RECIPE})
        if not as_json:
            print_line(f"\n[bold]{name}[/bold]: {pair.description}")
        with Monitor(quiet=as_json) as monitor:
            adapter = _distill(recipe, monitor)
            request = EvaluationRequest(adapter.folder, texts=(pair.heldout,), tokens=DEMO_EVALUATION_TOKENS)
            evaluated = evaluate_adapter(request, monitor.on_count)
        decision, seconds = adapter.record.scale_search.decision, round(time.monotonic() - started, 1)
        results[name] = {
            "decision": decision,
            "evaluation": evaluated.evaluation,
            "report": str(evaluated.report),
            "seconds": seconds,
        }
        if not as_json:
            show_figures(name, evaluated.evaluation)
            print_line(f"Scale search: {decision}")
            print_line(f"Report: {evaluated.report}  ({seconds} s)")
    if as_json:
        print_json(results)


@click.command("clean", short_help="Delete working files.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--yes", is_flag=True, help="Really delete; without it only the list is shown.")
@json_option
def clean_command(folder: Path, yes: bool, as_json: bool) -> None:
    """Delete the parts, the hidden states and other working files in FOLDER; the adapter itself stays.

    Parts are what a stopped run goes on from; states and completions in FOLDER/cache spare the next run or evaluation
    on the same text or problems a pass of the models. A cache outside FOLDER is left alone.
    """
    from moe_svd_distill.cli.screen import print_json
    from moe_svd_distill.errors import MissingInputError
    from moe_svd_distill.execution.publish import OutputFolder

    if not folder.is_dir():
        raise MissingInputError(f"{folder} is not a folder", "Give the output folder of a run")
    with OutputFolder(folder) as output:
        found = output.cleanable()
        size = sum(path.stat().st_size for path in found)
        if yes:
            output.clean()
    if as_json:
        print_json({"deleted": yes, "files": [str(path) for path in found], "bytes": size})
        return
    for path in found:
        click.echo(path)
    done = "deleted" if yes else "would be deleted; add --yes to do it"
    click.echo(f"{len(found)} files, {size / 2**20:.1f} MiB {done}")


def _distill(recipe: Recipe, monitor: Any) -> Adapter:
    from moe_svd_distill.pipeline.distill import Listener, distill

    return distill(recipe, Listener(monitor.on_plan, monitor.on_event, monitor.on_stage, monitor.say))


def _show(adapter: Adapter) -> None:
    from moe_svd_distill.cli.screen import print_line, print_table

    folder, record = adapter.folder, adapter.record
    rows = [("tensors with a LoRA pair", str(record.fates.get("lora", 0)))]
    rows += [(f"kept: {reason}", str(count)) for reason, count in record.reasons_to_keep.items()]
    rows += [(f"projection: {name}", str(count)) for name, count in record.projections.items()]
    rows += [(f"alignment: {name}", str(count)) for name, count in record.alignments.items()]
    rows += [("student tensors ignored", str(len(record.ignored_student_tensors)))]
    rows += [("teacher tensors nothing is made from", str(len(record.unused_teacher_tensors)))]
    print_table(f"Adapter in {folder}", ("what", "tensors"), rows)
    for name, reason in record.projection_fallbacks.items():
        print_line(f"{name}: {reason}")
    for unit in record.units:
        for name, count in unit.replaced_by_zero.items():
            print_line(f"{name}: {count} NaN or Inf taken as zero")
        for name, count in unit.norm_channels_not_folded.items():
            print_line(f"{name}: {count} channels with a gain near zero not folded")
    print_line(record.scale_search.decision)
    print_line(
        f"sha256 {adapter.sha256}\nNext: moe-svd-distill evaluate {quote(str(folder))} --teacher "
        f"{quote(record.teacher.source)} --text FILE{_for_llama_cpp(adapter)}"
    )


def _for_llama_cpp(adapter: Adapter) -> str:
    """How the adapter of a GGUF student comes to llama.cpp, whose converter reads the plain layout."""
    student = adapter.record.student.source
    if not student.lower().endswith(".gguf"):
        return ""
    command = f"moe-svd-distill export {quote(str(adapter.folder))} OUTPUT --format plain --student {quote(student)}"
    return f"\nNext, for llama.cpp: {command}"
