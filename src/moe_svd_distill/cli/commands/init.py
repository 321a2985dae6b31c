"""init: write a recipe."""

from __future__ import annotations

import click


@click.command("init", short_help="Write a recipe.")
@click.argument("teacher")
@click.argument("student")
def command(teacher: str, student: str) -> None:
    """Write a recipe for TEACHER and STUDENT to standard output, every key with its meaning and default."""
    from moe_svd_distill.recipe import parse_recipe, recipe_yaml

    click.echo(recipe_yaml(parse_recipe({"teacher": teacher, "student": student})), nl=False)
