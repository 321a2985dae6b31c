"""distill: make an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from moe_svd_distill.cli.options import json_option, read_recipe, recipe_options


@click.command("distill", short_help="Make an adapter.")
@recipe_options
@json_option
def command(recipe: Path | None, as_json: bool, **given: Any) -> None:
    """Make a LoRA adapter for the student from the teacher.

    Settings come from the command line, then from MOE_SVD_DISTILL_* variables, then from the RECIPE file, then from
    the preset. A run that was stopped goes on where it stopped when the same command is given again.
    """
    wanted = read_recipe(recipe, given)
    from moe_svd_distill.cli.screen import Monitor, print_json
    from moe_svd_distill.pipeline.distill import Listener, distill

    with Monitor(quiet=as_json) as monitor:
        adapter = distill(wanted, Listener(monitor.on_plan, monitor.on_event, monitor.on_stage, monitor.say))
    if as_json:
        print_json({"output": str(adapter.folder), **_essentials(adapter.record)})
    else:
        show(adapter.folder, adapter.record)


def show(folder: Path, record: Mapping[str, Any]) -> None:
    """What was done, for people."""
    from moe_svd_distill.cli.screen import output, print_table

    summary = record["summary"]
    rows = [("tensors with a LoRA pair", str(summary["fates"].get("lora", 0)))]
    rows += [(f"kept: {reason}", str(count)) for reason, count in summary["reasons_to_keep"].items()]
    rows += [(f"projection: {name}", str(count)) for name, count in summary["projections"].items()]
    rows += [(f"alignment: {name}", str(count)) for name, count in summary["alignments"].items()]
    rows += [("student tensors ignored", str(len(record["ignored_student_tensors"])))]
    rows += [("teacher tensors nothing is made from", str(len(record["unused_teacher_tensors"])))]
    print_table(f"Adapter in {folder}", ("what", "tensors"), rows)
    for name, reason in summary["projection_fallbacks"].items():
        output.print(f"{name}: {reason}", soft_wrap=True, highlight=False)
    for unit in record["units"]:
        for name, count in unit.get("replaced_by_zero", {}).items():
            output.print(f"{name}: {count} NaN or Inf taken as zero", soft_wrap=True, highlight=False)
        for name, count in unit.get("norm_channels_not_folded", {}).items():
            output.print(f"{name}: {count} channels with a gain near zero not folded", soft_wrap=True, highlight=False)
    output.print(record["scale_search"]["decision"], soft_wrap=True, highlight=False)
    output.print(
        f"sha256 {record['adapter_sha256']}\nNext: moe-svd-distill evaluate {folder} --teacher "
        f"{record['teacher']['source']} --text FILE",
        soft_wrap=True,
        highlight=False,
    )


def _essentials(record: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("tensors", "units", "unused_teacher_tensors", "ignored_student_tensors")
    return {key: value for key, value in record.items() if key not in left_out}
