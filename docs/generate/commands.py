"""The commands and their options, from the program that parses them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from docs.generate.words import escaped, table
from moe_svd_distill import errors
from moe_svd_distill.cli.main import INTERNAL_ERROR, INTERRUPTED, NOBODY_READS, PROGRAM, program
from moe_svd_distill.recipe import Recipe


def commands() -> Iterator[tuple[str, click.Context]]:
    """Each command's words behind the program's name, and what parses it; those of groups as well."""
    yield from _inside("", click.Context(program, info_name=PROGRAM))


def command_reference() -> str:
    """Every command: what it does, how it is called, its options."""
    overall = click.Context(program, info_name=PROGRAM)
    parts = ["## Options of every command", *_options(overall)]
    for words, context in commands():
        parts += [f"## `{words}` {{ #{words.replace(' ', '-')} }}", *_paragraphs(context.command.help or "")]
        parts += [f"```text\n{context.get_usage().removeprefix('Usage: ')}\n```", *_options(context)]
    return "\n\n".join(parts)


def exit_codes() -> str:
    """What each exit code means."""
    kinds = {kind.exit_code: kind for kind in errors.DistillError.__subclasses__()}
    meanings = {0: "Complete."} | {code: inspect.cleandoc(kind.__doc__ or "") for code, kind in kinds.items()}
    meanings |= {
        INTERNAL_ERROR: "Internal error: a fault of this program. Run again with `--debug` and report it.",
        INTERRUPTED: "Stopped by Ctrl-C (SIGINT).",
        143: "Stopped by SIGTERM.",
        NOBODY_READS: "Nobody reads the output any more (a closed pipe).",
    }
    return table(("code", "meaning"), [(str(code), meanings[code].partition("\n\n")[0]) for code in sorted(meanings)])


def _inside(words: str, context: click.Context) -> Iterator[tuple[str, click.Context]]:
    group = context.command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        inner = click.Context(command, info_name=name, parent=context)
        yield f"{words} {name}".strip(), inner
        yield from _inside(f"{words} {name}".strip(), inner)


def _paragraphs(text: str) -> list[str]:
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text).replace("\b", ""))
    return [escaped(" ".join(paragraph.split())) for paragraph in paragraphs]


def _options(context: click.Context) -> Iterator[str]:
    """A list of definitions; options that are keys of the recipe as well lead there."""
    takes_recipe = any(parameter.name == "recipe" for parameter in context.command.params)
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or not record[1] or "--help" in parameter.opts:
            continue
        name, meaning = record
        key = {"devices": "devices", "device": "devices"}.get(parameter.name or "", parameter.name or "")
        link = f" Recipe: [{key}](recipe.md#{key})." if takes_recipe and key in Recipe.model_fields else ""
        yield f"`{name}`\n:   {escaped(' '.join(meaning.split()))}{link}"
