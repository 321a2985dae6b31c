"""verify: is the adapter whole, and does PEFT load it."""

from __future__ import annotations

from pathlib import Path

import click

from moe_svd_distill.cli.options import json_option


@click.command("verify", short_help="Check an adapter.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--student", help="Folder or hub id of the student; default: the one the adapter names.")
@json_option
def command(folder: Path, student: str | None, as_json: bool) -> None:
    """Check the adapter in FOLDER: its bytes, its configuration, its values, and that PEFT loads every key."""
    from dataclasses import asdict

    from moe_svd_distill.adapter.verify import verify
    from moe_svd_distill.checkpoints import open_checkpoint
    from moe_svd_distill.cli.screen import print_json

    report = verify(folder, open_checkpoint(student) if student else None)
    if as_json:
        print_json({**asdict(report), "summary": report.summary})
        return
    for warning in report.warnings:
        click.echo(f"note: {warning}")
    if report.load:
        click.echo(f"PEFT loads all {report.load.keys} tensors into {report.load.targets} modules and parameters")
    click.echo(f"sha256 {report.sha256}{' as recorded' if report.digest_checked else ''}")
    click.echo(report.summary)
