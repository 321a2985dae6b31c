"""plan: what a recipe would do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from moe_svd_distill.cli.options import json_option, read_recipe, recipe_options


@click.command("plan", short_help="Show what a recipe would do.")
@recipe_options
@json_option
def command(recipe: Path | None, as_json: bool, **given: Any) -> None:
    """Show every pairing and every unmatched tensor, ranks and sizes of a run, and how the models are related.

    Headers are read, and of the weights the first layer and one of each kind behind it: these are run for a moment to
    tell how long the run would take. Layers are of one kind whose parameters have the same names and shapes. Of hub
    models nothing large is fetched.
    """
    wanted = read_recipe(recipe, given)
    from moe_svd_distill.cli.commands.inspect import show_choice, show_relatedness
    from moe_svd_distill.cli.screen import grouped, print_json, print_table
    from moe_svd_distill.pipeline.plan import make_plan

    outlook = make_plan(wanted, lambda: click.echo("measuring the speed of this machine", err=True)).as_dict()
    if as_json:
        print_json(outlook)
        return
    if outlook["preset"]:
        _show_preset(outlook["preset"])
    show_relatedness(outlook["relatedness"])
    show_choice("method auto", outlook["method"]["auto"])
    stages = outlook["method"]["stages"]
    click.echo(f"stages of this recipe: {' and '.join(stages) or 'none'}")
    if outlook["method"]["start"]:
        click.echo(f"training begins with the adapter in {outlook['method']['start']}")
    if "weights" in stages:
        print_table("weights stage: depth", ("student layer", "teacher layers"), outlook["depth"])
        print_table("weights stage: tensors", ("role", "with a pair", "kept", "rank"), outlook["roles"])
    print_table("sizes", ("what", ""), outlook["sizes"])
    if outlook["here"]:
        print_table("on this machine, about", ("stage", "time", "memory", "disk"), _stages(outlook["here"]))
    elif stages:
        click.echo("Time and memory are not known: the weights are not on this machine.")
    if "weights" in stages:
        for line in outlook["notes"]:
            click.echo(f"note: {line}")
        for kind in ("pairings", "kept", "ignored_student"):
            for line in grouped(
                {name: f"from {why}" if kind == "pairings" else why for name, why in outlook[kind].items()}
            ):
                click.echo(line)
        for line in grouped(outlook["unused_teacher"]):
            click.echo(f"teacher: {line}")


def _show_preset(preset: dict[str, Any]) -> None:
    words = [f"{key} {value}" for key, value in preset["supplied"].items()]
    words += [f"{key} {value} (given otherwise)" for key, value in preset["given_otherwise"].items()]
    click.echo(f"preset {preset['name']}: {', '.join(words)}")


def _stages(here: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    from moe_svd_distill.cli.screen import duration
    from moe_svd_distill.pipeline.cost import readable
    from moe_svd_distill.pipeline.duration import AROUND_S

    rows = [
        [stage, duration(cost["seconds"]), readable(cost["memory_bytes"]) if cost["memory_bytes"] else "what is free",
         readable(cost["disk_bytes"])]
        for stage, cost in here.items()
    ]  # fmt: skip
    together = AROUND_S + sum(cost["seconds"] for cost in here.values())
    return [*rows, ["together, with what lies around the stages", duration(together), "", ""]]
