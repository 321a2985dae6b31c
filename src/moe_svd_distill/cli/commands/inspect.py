"""inspect: what a model is, or how two are related; plan shows the latter too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moe_svd_distill.cli.options import json_option

if TYPE_CHECKING:
    from moe_svd_distill.pairing.lineage import MethodChoice, Probe, Relatedness


@click.command("inspect", short_help="Show what a model is, or how two are related.")
@click.argument("model")
@click.argument("student", required=False)
@json_option
def inspect_command(model: str, student: str | None, as_json: bool) -> None:
    """Show architecture, sizes, parameters, tensors and files of MODEL from its headers; no weight is read.

    With a STUDENT as well, MODEL is its teacher: show both side by side, how they are related by a few rows of their
    weights (at most 64 MiB of each model), and what method auto would run. Of hub models nothing large is fetched.

    Example: moe-svd-distill inspect Qwen/Qwen3-30B-A3B Qwen/Qwen3-0.6B
    """
    if student is not None:
        _show_pair(model, student, as_json)
        return
    from moe_svd_distill.cli.screen import grouped, print_facts, print_json, print_line, print_table
    from moe_svd_distill.pipeline.inspect import inspect

    facts = inspect(model)
    if as_json:
        print_json(facts)
        return
    rows = [(_in_words(key), _figure(value)) for key, value in facts.items() if not isinstance(value, dict)]
    for key in ("types", "stored_types"):
        counts = ", ".join(f"{count:,} {kind}" for kind, count in facts[key].items())
        rows.append(("types of tensors" if key == "types" else "stored as", counts))
    print_facts(model, rows)
    print_table("tensors", ("role", "count"), [(role, f"{count:,}") for role, count in facts["roles"].items()])
    for kind in ("without_role", "not_used"):
        for line in grouped(facts[kind]):
            print_line(line)


def _show_pair(teacher: str, student: str, as_json: bool) -> None:
    from moe_svd_distill.cli.screen import print_json, print_next, print_table
    from moe_svd_distill.files.typed import read_as
    from moe_svd_distill.pairing.lineage import MethodChoice, Relatedness
    from moe_svd_distill.pipeline.inspect import inspect

    facts = inspect(teacher, student)
    if as_json:
        print_json(facts)
        return
    rows = [
        (_in_words(key), _figure(value), _figure(facts["student"][key]))
        for key, value in facts["teacher"].items()
        if key != "model"
    ]
    print_table("sizes", ("", "teacher", "student"), rows)
    show_relatedness(read_as(Relatedness, facts["relatedness"]))
    for given, choice in facts["method"].items():
        show_choice(f"method auto {given.replace('_', ' ')}", read_as(MethodChoice, choice))
    print_next("init", teacher, student, into="recipe.yaml")


def show_relatedness(found: Relatedness) -> None:
    """Print the verdict, its grounds, and for each kind of tensor the most telling measurement."""
    from moe_svd_distill.cli.screen import print_facts, print_line, print_table

    vocabulary = found.vocabulary
    differences = [f"{_in_words(size.name)} {size.teacher} → {size.student}" for size in found.differences]
    rows = [
        ("lineage", found.lineage),
        ("family", "the same" if found.same_family else " → ".join(found.families)),
        ("shape", "the same" if found.same_shape else "different"),
        ("sizes that differ", ", ".join(differences) or "none"),
        ("vocabulary", f"{vocabulary.kind}, {vocabulary.shared:,} numbers mean the same token"),
    ]
    print_facts("how the models are related", rows)
    best: dict[str, Probe] = {}
    for probe in found.probes:
        if probe.role not in best or probe.deviations > best[probe.role].deviations:
            best[probe.role] = probe
    if best:
        columns = ("most alike", "compared", "cosine", "by chance", "deviations")
        print_table("lineage by weights", columns, [_row(probe) for probe in best.values()])
    print_line(f"lineage: {found.lineage}: {found.reason}")
    for line in (*vocabulary.reasons, *found.skipped):
        print_line(f"note: {line}")


def show_choice(title: str, choice: MethodChoice) -> None:
    """Print the stages and why."""
    from moe_svd_distill.cli.screen import print_line

    print_line(f"{title}: {' + '.join(choice.stages) or 'nothing'}: {choice.reason}")


def _in_words(key: str) -> str:
    return key.replace("_", " ")


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _row(probe: Probe) -> tuple[str, ...]:
    return (probe.role, probe.comparison, f"{probe.cosine:.3f}", f"{probe.chance:.3f}", f"{probe.deviations:+.1f}")
