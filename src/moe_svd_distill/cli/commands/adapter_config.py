"""adapter-config: a right adapter_config.json from the header alone."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("adapter-config", short_help="Rebuild adapter_config.json.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    help="Folder of the student; without it modules are named by their last part.",
)
@click.option("--base-model", help="What to write as the base model.")
@click.option("--write", is_flag=True, help="Write it beside the adapter instead of printing it.")
@click.option(
    "--repair-names", type=click.Path(path_type=Path), help="First write a copy of FILE under names that PEFT matches."
)
def command(file: Path, student: Path | None, base_model: str | None, write: bool, repair_names: Path | None) -> None:
    """Rebuild the configuration of the adapter FILE from its header; no weight is loaded."""
    from moe_svd_distill.adapter.repair import rebuild_configuration, repair_keys
    from moe_svd_distill.files.names import CONFIGURATION_FILE
    from moe_svd_distill.files.writing import write_json

    if repair_names is not None:
        renamed = repair_keys(file, repair_names)
        click.echo(f"{repair_names}: {len(renamed)} tensors renamed", err=True)
        file = repair_names
    configuration = rebuild_configuration(file, student, base_model=base_model)
    if student is None:
        click.echo(
            "note: without --student modules are named by the last part of their names, which PEFT on transformers 5 "
            "loads for models without experts only",
            err=True,
        )
    if write:
        target = (file if file.is_dir() else file.parent) / CONFIGURATION_FILE
        write_json(target, configuration)
        click.echo(target)
    else:
        click.echo(json.dumps(configuration, indent=2))
