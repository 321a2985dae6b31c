"""push: an adapter to the hub."""

from __future__ import annotations

from pathlib import Path

import click

from moe_svd_distill.cli.options import json_option


@click.command("push", short_help="Send an adapter to the hub.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--public", is_flag=True, help="Let all see it; by default the repository is private.")
@click.option("--dry-run", is_flag=True, help="Only list the files and their sizes.")
@json_option
def command(folder: Path, repo: str, public: bool, dry_run: bool, as_json: bool) -> None:
    """Send the adapter in FOLDER to REPO (ORGANISATION/NAME) on the hub, which is made if it is not there.

    Sent are weights, configuration, card, record and figures. Parts, hidden states and the report stay here; so do
    passages of held-out text. Paths of this machine are cut to their last part. Given again after a failure, the
    command sends what has not arrived. The token is that of `hf auth login` or HF_TOKEN.

    Example: moe-svd-distill push out organisation/name --dry-run
    """
    from dataclasses import asdict

    from moe_svd_distill.cli.screen import print_facts, print_json, print_line, print_next
    from moe_svd_distill.pipeline.push import push

    report = push(folder, repo, public=public, dry_run=dry_run)
    if as_json:
        print_json(asdict(report))
        return
    rows = [
        (name, f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size:,} bytes")
        for name, size in report.files.items()
    ]
    print_facts(f"{'Would be sent' if dry_run else 'Sent'} to {repo}", rows)
    if report.left:
        print_line(f"Not sent: {', '.join(report.left)}")
    if report.url:
        print_line(f"{report.url} ({'private' if report.private else 'public'})")
    else:
        print_next("push", folder, repo, *(("--public",) if public else ()))
