"""Recipes written and described: init, schema; and what a shell needs to complete them all."""

from __future__ import annotations

import click

from moe_svd_distill.cli.options import Word


@click.command("init", short_help="Write a recipe.")
@click.argument("teacher")
@click.argument("student")
def init_command(teacher: str, student: str) -> None:
    """Write a recipe for TEACHER and STUDENT to standard output: every key, what it means, what it takes.

    Keys that presets set are comments, so that a preset in the file has an effect.

    Example: moe-svd-distill init Qwen/Qwen3-8B Qwen/Qwen3-0.6B > recipe.yaml
    """
    from moe_svd_distill.recipe import PRESET_KEYS, parse_recipe, recipe_yaml

    click.echo(recipe_yaml(parse_recipe({"teacher": teacher, "student": student}), PRESET_KEYS), nl=False)
    click.echo("Next, saved as recipe.yaml: moe-svd-distill plan recipe.yaml --calibration TEXT", err=True)


@click.command("schema", short_help="Print the JSON schema of recipes.")
def schema_command() -> None:
    """Print the JSON schema of recipes, for editors and other programs.

    Example: moe-svd-distill schema > recipe.schema.json
    """
    from moe_svd_distill.cli.screen import print_json
    from moe_svd_distill.recipe import recipe_schema

    print_json(recipe_schema())


@click.command("completion", short_help="Print a shell's completion script.")
@click.argument("shell", metavar="SHELL", type=Word(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the script that completes commands and options in SHELL: bash, zsh or fish.

    Example: moe-svd-distill completion bash >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    from moe_svd_distill.cli.main import COMPLETE_VARIABLE, PROGRAM, program

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(program, {}, PROGRAM, COMPLETE_VARIABLE).source())
