"""export: the adapter in another layout, or for the student's class for text alone."""

from __future__ import annotations

from pathlib import Path

import click

from moe_svd_distill.cli.options import json_option


@click.command("export", short_help="Write an adapter in another layout.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "layout",
    type=click.Choice(["peft", "plain", "fused"]),
    default="peft",
    show_default=True,
    help="peft: for PEFT on transformers 5. plain: stored names alone, for vLLM, SGLang, llama.cpp and transformers 4. "
    "fused: one pair for all experts of a layer, for PEFT and vLLM.",
)
@click.option("--text-only", is_flag=True, help="For the student's class for text alone, not the checkpoint's own.")
@click.option("--student", help="Folder or hub id of the student; default: the one the adapter names.")
@json_option
def command(folder: Path, output: Path, layout: str, text_only: bool, student: str | None, as_json: bool) -> None:
    """Write the adapter in FOLDER to OUTPUT with the same changes under other keys; PEFT is asked whether it loads."""
    from dataclasses import asdict

    from moe_svd_distill.adapter.export import export
    from moe_svd_distill.checkpoints import open_checkpoint
    from moe_svd_distill.cli.screen import print_json

    checkpoint = open_checkpoint(student) if student else None
    report = export(folder, output, layout, checkpoint, text_only=text_only)  # type: ignore[arg-type]
    if as_json:
        print_json({**asdict(report), "output": str(report.output)})
        return
    click.echo(f"{report.output}: {report.tensors} tensors")
    click.echo("PEFT loads all of them" if report.loads else f"PEFT does not load it as it is: {report.why_not}")
    for limit in report.limits:
        click.echo(f"note: {limit}")
