"""inspect: what a model is, or how two are related."""

from __future__ import annotations

import gc
from collections import Counter
from math import prod
from typing import Any

import click

from moe_svd_distill.cli.options import json_option


@click.command("inspect", short_help="Show what a model is, or how two are related.")
@click.argument("model")
@click.argument("student", required=False)
@json_option
def command(model: str, student: str | None, as_json: bool) -> None:
    """Show architecture, sizes, parameters, tensors and files of MODEL from its headers; no weight is read.

    With a STUDENT as well, MODEL is its teacher: show both side by side, how they are related by a few rows of their
    weights (at most 64 MiB of each model), and what method auto would run. Of hub models nothing large is fetched.
    """
    if student is not None:
        from moe_svd_distill.cli.relation import show_pair

        show_pair(model, student, as_json=as_json)
        return
    from moe_svd_distill.cli.screen import grouped, print_json, print_table
    from moe_svd_distill.pipeline.pair import open_model

    gc.disable()  # of a hundred thousand headers: looking for cycles that are not there takes a quarter of the time
    try:
        facts = _facts(open_model(model, headers_only=True))
    finally:
        gc.enable()
    if as_json:
        print_json(facts)
        return
    rows = [(key, str(value)) for key, value in facts.items() if not isinstance(value, dict)]
    for key in ("types", "stored_types"):
        rows.append((key, ", ".join(f"{count} {kind}" for kind, count in facts[key].items())))
    print_table(model, ("what", ""), rows)
    print_table("tensors", ("role", "count"), [(role, str(count)) for role, count in facts["roles"].items()])
    for kind in ("without_role", "not_used"):
        for line in grouped(facts[kind]):
            click.echo(line)


def _facts(opened: Any) -> dict[str, Any]:
    from dataclasses import asdict

    layout, checkpoint = opened.layout, opened.checkpoint
    parameters, active = layout.parameters(opened.shapes)
    embedding = layout.find("embedding")
    return {
        "family": layout.model_type,
        **asdict(layout.geometry),
        "parameters": parameters,
        "active_parameters": active,
        "embedding_parameters": prod(opened.shapes[embedding]) if embedding else 0,
        "quantisation": checkpoint.quantisation,
        "tensors": len(checkpoint),
        "bytes": checkpoint.total_bytes,
        "files": len({info.file for info in checkpoint.stored.values()}),
        "types": dict(Counter(info.dtype for info in checkpoint.values())),
        "stored_types": dict(Counter(info.dtype for info in checkpoint.stored.values())),
        "roles": dict(Counter(meaning.role for meaning in layout.meanings.values())),
        "without_role": dict(layout.without_role),
        "not_used": {**layout.ignored, **checkpoint.set_aside},
    }
