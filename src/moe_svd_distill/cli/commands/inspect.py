"""inspect: what a model is, or how two are related; plan shows the latter too."""

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
def inspect_command(model: str, student: str | None, as_json: bool) -> None:
    """Show architecture, sizes, parameters, tensors and files of MODEL from its headers; no weight is read.

    With a STUDENT as well, MODEL is its teacher: show both side by side, how they are related by a few rows of their
    weights (at most 64 MiB of each model), and what method auto would run. Of hub models nothing large is fetched.
    """
    if student is not None:
        _show_pair(model, student, as_json)
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


def _show_pair(teacher: str, student: str, as_json: bool) -> None:
    from moe_svd_distill.cli.screen import print_json, print_table
    from moe_svd_distill.pipeline.method import compare_models

    facts = compare_models(teacher, student)
    if as_json:
        print_json(facts)
        return
    rows = [(key, str(value), str(facts["student"][key])) for key, value in facts["teacher"].items()]
    print_table("sizes", ("", "teacher", "student"), rows)
    show_relatedness(facts["relatedness"])
    for given, choice in facts["method"].items():
        show_choice(f"method auto {given.replace('_', ' ')}", choice)


def show_relatedness(relatedness: dict[str, Any]) -> None:
    """Print the verdict, its grounds, and for each kind of tensor the most telling measurement."""
    from moe_svd_distill.cli.screen import print_table

    vocabulary = relatedness["vocabulary"]
    differences = [f"{item['name']} {item['teacher']} → {item['student']}" for item in relatedness["differences"]]
    rows = [
        ("lineage", relatedness["lineage"]),
        ("family", "the same" if relatedness["same_family"] else " → ".join(relatedness["families"])),
        ("shape", "the same" if relatedness["same_shape"] else "different"),
        ("sizes that differ", ", ".join(differences) or "none"),
        ("vocabulary", f"{vocabulary['kind']}, {vocabulary['shared']} numbers mean the same token"),
    ]
    print_table("relatedness", ("what", ""), rows)
    best: dict[str, dict[str, Any]] = {}
    for probe in relatedness["probes"]:
        if probe["role"] not in best or probe["deviations"] > best[probe["role"]]["deviations"]:
            best[probe["role"]] = probe
    if best:
        columns = ("most alike", "compared", "cosine", "by chance", "standard deviations")
        print_table("lineage by weights", columns, [_row(probe) for probe in best.values()])
    click.echo(f"lineage: {relatedness['lineage']}: {relatedness['reason']}")
    for line in (*vocabulary["reasons"], *relatedness["skipped"]):
        click.echo(f"note: {line}")


def show_choice(title: str, choice: dict[str, Any]) -> None:
    """Print the stages and why."""
    click.echo(f"{title}: {' + '.join(choice['stages']) or 'nothing'}: {choice['reason']}")


def _row(probe: dict[str, Any]) -> tuple[str, ...]:
    figures = (f"{probe['cosine']:.3f}", f"{probe['chance']:.3f}", f"{probe['deviations']:+.1f}")
    return (probe["role"], probe["comparison"], *figures)


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
