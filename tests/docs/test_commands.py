"""Every command that the manual shows is one that the program takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from docs.generate.commands import command_reference, commands
from moe_svd_distill.cli.main import PROGRAM, program
from moe_svd_distill.errors import UsageError
from moe_svd_distill.recipe import Recipe, parse_recipe
from tests.docs.pages import MANUAL, blocks, named, spans

# Options of the programs that adapters are served with.
FOREIGN = {"--max-lora-rank", "--lora-target-modules", "--hf-path"}
_CALLS = re.compile(rf"(?:^|(?<=\s)|(?<=`)){PROGRAM} ")
_RECIPE = {"teacher": "T", "student": "S", "calibration": ["text.jsonl"]}


def shown(text: str) -> Iterator[list[str]]:
    """The words behind the program's name, of every call in the blocks and between back-ticks."""
    lines = [line for block in blocks(text, "bash", "sh", "") for line in block.code.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(text)]:
        start = _CALLS.search(line)
        if start:
            lexer = shlex.shlex(line[start.end() :], posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
            end = next((place for place, word in enumerate(words) if word in {">", "|", ";", "&&", "||"}), len(words))
            yield [word for word in words[:end] if word != "--debug"]


def check(words: list[str], group: click.Group = program) -> None:
    """Parse a call as the program does, without running it.

    Raises:
        AssertionError: There is no such command.
        click.UsageError: An option or argument is wrong.
        UsageError: A setting of the recipe is.
    """
    name, *rest = words
    if name.startswith("-"):
        assert name in options(group), name
        return
    command = group.get_command(click.Context(group), name)
    assert command is not None, f"no command {name}"
    if isinstance(command, click.Group):
        check(rest, command)
        return
    given = command.make_context(name, rest).params
    settings = {key: value for key, value in given.items() if key in Recipe.model_fields and value not in (None, ())}
    if "recipe" in given and settings:
        parse_recipe(
            _RECIPE | {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        )


def options(command: click.Command) -> set[str]:
    """Names of a command's options."""
    return {name for parameter in command.get_params(click.Context(command)) for name in parameter.opts}


@pytest.mark.parametrize("page", MANUAL, ids=named)
def test_every_call_of_the_program_parses(page: Path) -> None:
    for words in shown(page.read_text(encoding="utf-8")):
        try:
            check(words)
        except click.exceptions.Exit:
            pass  # --help
        except Exception as error:
            pytest.fail(f"{named(page)}: {PROGRAM} {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", MANUAL, ids=named)
def test_every_option_between_back_ticks_exists(page: Path) -> None:
    of_command: dict[str, set[str]] = {words: options(context.command) for words, context in commands()}
    known = FOREIGN.union(options(program), *of_command.values())
    for span in spans(page.read_text(encoding="utf-8")):
        first, *rest = span.split()
        asked = {word.partition("=")[0] for word in (first, *rest) if word.startswith("--")}
        if first.startswith("--") or first in of_command:
            wrong = asked - of_command.get(first, known)
            assert not wrong, f"{named(page)}: `{span}` names {wrong}"


@pytest.mark.parametrize(
    "call",
    [
        "distill --rnak 3",
        "distil recipe.yaml",
        "evaluate out --tokens few",
        "evaluate out --mode sideways",
        "export out",
        "plan --preset bset",
        "distill recipe.yaml --method calibratd",
        "--versoin",
    ],
)
def test_what_the_program_does_not_take_is_found(call: str) -> None:
    (words,) = shown(f"```bash\n{PROGRAM} {call} > file\n```")
    with pytest.raises((AssertionError, click.UsageError, UsageError)):
        check(words)
    assert list(shown(f"Use `{PROGRAM} {call}`.")) == [words]


def test_the_reference_has_every_command_with_its_options() -> None:
    reference = command_reference()
    assert "Models in memory, or one layer at a time" in reference
    for words, context in commands():
        section = reference.partition(f"## `{words}` {{")[2].partition("\n## ")[0]
        assert f"{PROGRAM} {words}" in section
        assert all(name in section for name in options(context.command) - {"--help", "-h"} if name.startswith("--"))
