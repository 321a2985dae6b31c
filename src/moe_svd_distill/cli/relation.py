"""How people see the relation of two models; inspect and plan share it."""

from __future__ import annotations

from typing import Any

import click

from moe_svd_distill.cli.screen import print_json, print_table


def show_pair(teacher: str, student: str, *, as_json: bool) -> None:
    """Print two models side by side, their relatedness, and what ``method: auto`` would run."""
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
