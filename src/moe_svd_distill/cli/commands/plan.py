"""plan: what a recipe would do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_svd_distill.cli.options import Shown, read_recipe, recipe_options, shown_options

if TYPE_CHECKING:
    from moe_svd_distill.calibration.paired import PairedText
    from moe_svd_distill.pipeline.plan import Plan
    from moe_svd_distill.recipe import Recipe


@click.command("plan", short_help="Show what a recipe would do.")
@recipe_options
@shown_options
def command(recipe: Path | None, force: bool, shown: Shown, **given: Any) -> None:
    """Show what distill would do, and refuse what it would refuse: the same as distill --dry-run.

    Headers and the calibration text are read, and of the weights the first layer and one of each kind behind it: these
    are run for a moment to tell how long the run would take. Layers are of one kind whose parameters have the same
    names and shapes. Of hub models no weights are fetched.

    Example: moe-svd-distill plan recipe.yaml --preset best
    """
    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.pipeline.plan import make_plan

    with Monitor(shown) as monitor:
        planned = make_plan(read_recipe(recipe, given, monitor.note), monitor.on_event, force=force)
    show_plan(planned, shown)


def show_plan(plan: Plan, shown: Shown) -> None:
    """Print a plan."""
    from moe_svd_distill.cli.commands.inspect import show_choice, show_relatedness
    from moe_svd_distill.cli.screen import grouped, print_facts, print_json, print_line, print_table
    from moe_svd_distill.pipeline.method import automatic_choice

    if shown.as_json:
        print_json(plan.as_dict())
        return
    if plan.recipe.preset:
        _show_preset(plan.recipe)
    relatedness, stages = plan.stages.relatedness, plan.stages.names
    show_relatedness(relatedness)
    show_choice("method auto", automatic_choice(plan.recipe, relatedness))
    print_line(f"stages of this recipe: {' and '.join(stages) or 'none'}")
    if plan.stages.start:
        print_line(f"training begins with the adapter in {plan.stages.start}")
    if "weights" in stages:
        print_table("weights stage: depth", ("student layer", "teacher layers"), plan.depth)
        print_table("weights stage: matrices", ("role", "changed", "unchanged", "rank"), plan.roles)
    if plan.text:
        columns = ("text", "tokens", "asked for", "documents", "sources")
        print_table("calibration text", columns, [_text(*part) for part in plan.text.parts.items()])
    tables: dict[str, list[tuple[str, str]]] = {}
    for name, value in plan.sizes:
        stage, _, what = name.rpartition(": ")
        tables.setdefault(stage or "models", []).append((what, value))
    for stage, rows_of_stage in tables.items():
        print_facts(stage, rows_of_stage)
    if plan.here:
        print_table("on this machine, about", ("stage", "time", "memory", "disk"), _stages(plan))
    elif stages:
        print_line("Time and memory are not known: the weights are not on this machine.")
    for line in (*plan.warnings, *(plan.pairing.notes if "weights" in stages else ())):
        print_line(f"note: {line}")
    if "weights" in stages:
        for reasons in (
            {name: f"from {source}" for name, source in plan.pairings.items()},
            plan.kept,
            plan.pairing.ignored_student,
        ):
            for line in grouped(reasons):
                print_line(line)
        for line in grouped(plan.pairing.unused_teacher):
            print_line(f"teacher: {line}")
    _show_next()


def _show_next() -> None:
    """The same words with distill in place of plan."""
    from moe_svd_distill.cli.screen import print_next

    words = [word for word in click.get_current_context().obj or () if word != "--dry-run"]
    if not words:  # called as a function
        return
    print_next("distill", *words[words.index("plan" if "plan" in words else "distill") + 1 :])


def _show_preset(recipe: Recipe) -> None:
    from moe_svd_distill.cli.screen import print_line
    from moe_svd_distill.recipe import supplied_values

    supplied, otherwise = supplied_values(recipe)
    words = [f"{key} {value}" for key, value in supplied.items()]
    words += [f"{key} {value} (given otherwise)" for key, value in otherwise.items()]
    print_line(f"preset {recipe.preset}: {', '.join(words)}")


_PARTS = {"fit": "to train on", "check": "to choose passes and ranks by", "search": "to search the scale on"}


def _text(name: str, part: PairedText) -> list[str]:
    read = part.student
    figures = (read.tokens, read.asked, len(read.sources), len(read.groups))
    return [_PARTS.get(name, name), *("-" if figure is None else f"{figure:,}" for figure in figures)]


def _stages(plan: Plan) -> list[list[str]]:
    from moe_svd_distill.cli.screen import duration
    from moe_svd_distill.pipeline.cost import readable
    from moe_svd_distill.pipeline.duration import AROUND_S
    from moe_svd_distill.pipeline.placement import free_here

    rows = [
        [stage, duration(cost.seconds), readable(cost.memory_bytes) if cost.memory_bytes else "what is free",
         readable(cost.disk_bytes)]
        for stage, cost in plan.here.items()
    ]  # fmt: skip
    together, free = AROUND_S + sum(cost.seconds for cost in plan.here.values()), free_here(plan.recipe)
    rows.append(["together, with what lies around them", duration(together), "", ""])
    return [*rows, ["free now", "", readable(free["memory_bytes"]), readable(free["disk_bytes"])]]
