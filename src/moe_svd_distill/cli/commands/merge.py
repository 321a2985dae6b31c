"""merge: the student with the adapter inside."""

from __future__ import annotations

from pathlib import Path

import click

from moe_svd_distill.cli.options import json_option


@click.command("merge", short_help="Merge an adapter into the student.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--student", help="Folder or hub id of the student; default: the one the adapter names.")
@json_option
def command(folder: Path, output: Path, student: str | None, as_json: bool) -> None:
    """Write the student with the adapter in FOLDER merged in to OUTPUT, shard by shard, in the stored types."""
    from dataclasses import asdict

    from moe_svd_distill.adapter.adapter_file import read_json
    from moe_svd_distill.adapter.merge import merge
    from moe_svd_distill.checkpoints import open_checkpoint
    from moe_svd_distill.cli.screen import Monitor, print_json
    from moe_svd_distill.errors import MissingInputError, UsageError
    from moe_svd_distill.files.names import CONFIGURATION_FILE

    configuration = folder / CONFIGURATION_FILE
    if not configuration.is_file():
        raise MissingInputError(f"{folder} holds no adapter (no {CONFIGURATION_FILE})", "Give an adapter's folder")
    source = student or read_json(configuration).get("base_model_name_or_path")
    if not source:
        raise UsageError(f"{configuration} names no base model", "Give --student")
    with Monitor(quiet=as_json) as monitor, open_checkpoint(source) as checkpoint:
        report = merge(
            folder,
            checkpoint,
            output,
            on_progress=lambda done, total: monitor.on_stage("merging", done / max(1, total)),
        )
    if as_json:
        print_json({**asdict(report), "output": str(report.output)})
        return
    for name in report.left_out:
        click.echo(f"not copied: {name}")
    click.echo(
        f"{report.output}: {report.merged} tensors merged, {report.copied} copied unchanged, "
        f"{report.weights_files} weights files, {report.bytes / 2**20:.1f} MiB"
    )
