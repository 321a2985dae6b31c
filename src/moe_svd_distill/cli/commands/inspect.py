"""inspect: what a model is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from moe_svd_distill.cli.options import json_option


@click.command("inspect", short_help="Show what a model is.")
@click.argument("model")
@json_option
def command(model: str, as_json: bool) -> None:
    """Show architecture, sizes, tensors and files of MODEL from its headers; no weight is read."""
    from moe_svd_distill.cli.screen import print_json, print_table
    from moe_svd_distill.pipeline.pair import open_model

    facts = _facts(open_model(model))
    if as_json:
        print_json(facts)
        return
    print_table(model, ("what", ""), [(key, str(value)) for key, value in facts.items() if not isinstance(value, dict)])
    print_table("tensors", ("role", "count"), [(role, str(count)) for role, count in facts["roles"].items()])
    for name, reason in facts["not_used"].items():
        click.echo(f"{name}: {reason}")


def _facts(opened: Any) -> dict[str, Any]:
    from dataclasses import asdict

    layout, checkpoint = opened.layout, opened.checkpoint
    roles = Counter(meaning.role.role for meaning in layout.meanings.values())
    unknown = dict.fromkeys(layout.unknown, f"not known in the family {layout.family.model_type}")
    return {
        "family": layout.family.model_type,
        **asdict(layout.geometry),
        "tensors": len(checkpoint),
        "bytes": checkpoint.total_bytes,
        "files": len({info.file for info in checkpoint.values()}),
        "types": dict(Counter(info.dtype for info in checkpoint.values())),
        "roles": dict(roles),
        "not_used": {**layout.ignored, **unknown},
    }
