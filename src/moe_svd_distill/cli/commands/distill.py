"""Making an adapter: distill, demo, and clean afterwards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_svd_distill.cli.options import Shown, json_option, read_recipe, recipe_options, shown_options

if TYPE_CHECKING:
    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.pipeline.record import Adapter
    from moe_svd_distill.recipe import Recipe

DEMO_PAIRS = ("sibling", "independent")
DEMO_EVALUATION_TOKENS = 16_000
DEMO_RECIPE = {"scale_search_tokens": 8_192, "tokens": 8_192, "copies": 3, "fit_passes": 4, "rank": 16}
_LONG = ("tensors", "units", "unused_teacher_tensors", "ignored_student_tensors")


@click.command("distill", short_help="Make an adapter.")
@recipe_options
@click.option("--dry-run", is_flag=True, help="Only show what would be done, as plan does.")
@shown_options
def distill_command(recipe: Path | None, force: bool, dry_run: bool, shown: Shown, **given: Any) -> None:
    """Make a LoRA adapter for the student from the teacher.

    Settings come from the command line, then from MOE_SVD_DISTILL_* variables (MOE_SVD_DISTILL_TRAINING__EPOCHS for
    training.epochs), then from the RECIPE file. A preset counts where it is named. A run that was stopped goes on from
    what it had finished or saved when the same command is given again.

    Example: moe-svd-distill distill recipe.yaml --calibration text/ --output out
    """
    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.cli.screen import print_json

    with Monitor(shown) as monitor:
        wanted = read_recipe(recipe, given, monitor.note)
        if dry_run:
            from moe_svd_distill.cli.commands.plan import show_plan
            from moe_svd_distill.pipeline.plan import make_plan

            planned = make_plan(wanted, monitor.on_event, force=force)
        else:
            adapter = _distill(wanted, monitor, force)
    if dry_run:
        show_plan(planned, shown)
    elif shown.as_json:
        essentials = {key: value for key, value in adapter.record.content.items() if key not in _LONG}
        print_json({"output": str(adapter.folder), **essentials})
    else:
        _show(adapter, shown.verbose)


@click.command("demo", short_help="The whole pipeline, no download.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option("--pair", "pairs", multiple=True, help="Lab pair; repeatable. Default: sibling and independent.")
@shown_options
def demo_command(output: Path, pairs: tuple[str, ...], shown: Shown) -> None:
    """Distil the bundled lab pairs, evaluate the adapters on held-out text, and show what they do.

    The sibling pair shares shape and lineage, so its weights carry over, and text refines them. The independent pair
    shares nothing but the tokenizer: there the head and the last layer are fitted to the teacher on a little text.

    Example: moe-svd-distill demo --pair sibling
    """
    from moe_svd_distill.cli.evaluation import show as show_figures
    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.cli.screen import print_json, print_line, print_next
    from moe_svd_distill.pipeline.evaluate import evaluate
    from moe_svd_distill.pipeline.lab import lab_pair
    from moe_svd_distill.recipe import parse_recipe

    results: dict[str, object] = {}
    chosen = {name: lab_pair(name) for name in pairs or DEMO_PAIRS}
    for name, pair in chosen.items():
        started = time.monotonic()
        models = {"teacher": str(pair.teacher), "student": str(pair.student), "output": output / name}
        recipe = parse_recipe({**models, "calibration": [str(pair.calibration)], **DEMO_RECIPE})
        if not shown.as_json:
            print_line(f"\n{name}: {pair.description}")
        with Monitor(shown) as monitor:
            adapter = _distill(recipe, monitor, force=True)
            evaluated = evaluate(adapter.folder, [pair.heldout], monitor.on_count, tokens=DEMO_EVALUATION_TOKENS)
        decision, seconds = adapter.record.scale_search.decision, round(time.monotonic() - started, 1)
        results[name] = {
            "decision": decision,
            "evaluation": evaluated.evaluation.content,
            "report": str(evaluated.report),
            "seconds": seconds,
        }
        if not shown.as_json:
            show_figures(name, evaluated.evaluation)
            print_line(f"Scale search: {decision}")
            print_line(f"Report: {evaluated.report}  ({seconds} s)")
    if shown.as_json:
        print_json(results)
    else:
        print_next("init", "TEACHER", "STUDENT", note="with models of your own", into="recipe.yaml")


@click.command("clean", short_help="Delete working files.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--yes", is_flag=True, help="Really delete; without it only the list is shown.")
@json_option
def clean_command(folder: Path, yes: bool, as_json: bool) -> None:
    """Delete the parts, the hidden states and other working files in FOLDER; the adapter itself stays.

    Parts are what a stopped run goes on from; states and completions in FOLDER/cache spare the next run or evaluation
    on the same text or problems a pass of the models. A cache outside FOLDER is left alone.

    Example: moe-svd-distill clean out --yes
    """
    from moe_svd_distill.cli.screen import print_json, print_next
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
    click.echo(f"{len(found)} files, {size / 2**20:.1f} MiB {'deleted' if yes else 'would be deleted'}")
    if found and not yes:
        print_next("clean", folder, "--yes")


def _distill(recipe: Recipe, monitor: Monitor, force: bool) -> Adapter:
    from moe_svd_distill.pipeline.distill import distill

    return distill(recipe, monitor.on_event, force=force)


def _show(adapter: Adapter, everything: bool) -> None:
    from moe_svd_distill.cli.screen import print_facts, print_line, print_next

    folder, record = adapter.folder, adapter.record
    rows = [("matrices changed", str(record.fates.get("lora", 0)))]
    rows += [("matrices unchanged", f"{count}: {reason}") for reason, count in record.reasons_to_keep.items()]
    if everything:
        rows += [("brought to shape by", f"{name}: {count}") for name, count in record.projections.items()]
        rows += [("brought into order by", f"{name}: {count}") for name, count in record.alignments.items()]
        rows += [("not read, of the student", str(len(record.ignored_student_tensors)))]
        rows += [("not used, of the teacher", str(len(record.unused_teacher_tensors)))]
    print_facts(f"Adapter in {folder}", rows)
    for name, reason in record.projection_fallbacks.items():
        print_line(f"{name}: {reason}")
    for unit in record.units:
        for name, count in unit.get("replaced_by_zero", {}).items():
            print_line(f"{name}: {count} NaN or Inf taken as zero")
        for name, count in unit.get("norm_channels_not_folded", {}).items():
            print_line(f"{name}: {count} channels whose norm gain is near zero keep the student's gain")
    if everything:
        print_line(f"sha256 {adapter.sha256}")
    print_line(record.scale_search.decision)
    print_next("evaluate", folder, "--text", "FILE")
    if record.student.source.lower().endswith(".gguf"):  # whose converter reads the plain layout
        words = ("export", folder, "OUTPUT", "--format", "plain", "--student", record.student.source)
        print_next(*words, note="for llama.cpp")
