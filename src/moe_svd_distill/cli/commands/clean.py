"""clean: delete working files."""

from __future__ import annotations

from pathlib import Path

import click

from moe_svd_distill.cli.options import json_option


@click.command("clean", short_help="Delete working files.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--yes", is_flag=True, help="Really delete; without it only the list is shown.")
@json_option
def command(folder: Path, yes: bool, as_json: bool) -> None:
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
