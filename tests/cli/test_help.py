"""--help, --version, schema and completion: what a newcomer reads first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import click
import pytest

from moe_svd_distill.cli.main import COMMANDS, program
from moe_svd_distill.recipe import Recipe
from tests.support.commands import run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_one_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, name, "--help")
    assert code == 0
    assert " ".join(text.split()).count(f"Example: moe-svd-distill {name}") == 1
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", ["plan", "distill"])
def test_settings_show_what_they_take_and_their_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, name, "--help")[1].split())
    for words in (
        "[auto, weights, calibrated, weights+calibrated or refined; default: auto]",
        "[a whole number (at least 512); default: 65536]",
        "[full or a whole number (at least 1); default: 64]",
        "[fast, balanced or best]",
        "--set KEY=VALUE",
    ):
        assert words in text


def test_every_option_of_a_setting_is_a_key_of_the_recipe() -> None:
    with click.Context(program) as context:
        command = program.get_command(context, "distill")
    assert command is not None
    settings = {option.name for option in command.params if type(option).__name__ == "_Setting"}
    assert {"teacher", "preset", "devices"} <= settings <= set(Recipe.model_fields)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert version("moe-svd-distill") in run(capsys, "--version")[1]


def test_the_schema_has_every_key_with_its_choices(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(run(capsys, "schema")[1])
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert all(field.get("description") or "$ref" in field for field in schema["properties"].values())
    assert "forward" in schema["$defs"]["TrainingRecipe"]["properties"]["divergence"]["enum"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "completion", shell)
    assert code == 0
    assert "_MOE_SVD_DISTILL_COMPLETE" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ev", {"plain,evaluate"}),
        ("distill --scale", {"plain,--scale-search-tokens"}),
        ("completion z", {"plain,zsh"}),
        ("plan --preset b", {"plain,balanced", "plain,best"}),
        ("distill --method w", {"plain,weights", "plain,weights+calibrated"}),
        ("distill --rank f", {"plain,full"}),
    ],
)
def test_a_shell_is_answered(words: str, expected: set[str]) -> None:
    environment = {"COMP_WORDS": f"moe-svd-distill {words}", "COMP_CWORD": str(len(words.split()))}
    environment["_MOE_SVD_DISTILL_COMPLETE"] = "bash_complete"
    command = [sys.executable, "-m", "moe_svd_distill"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert (done.returncode, set(done.stdout.split())) == (0, expected), done.stderr


def test_completion_without_a_shell_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "completion")
    assert code == 2
    said = "moe-svd-distill: Missing argument 'SHELL'. Expected bash, zsh or fish. "
    assert error == f"{said}Try: moe-svd-distill completion --help\n"


@pytest.mark.parametrize(("typed", "meant"), [("distil", "distill"), ("evalute", "evaluate"), ("inspekt", "inspect")])
def test_a_mistyped_command_gets_a_suggestion(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, typed, "x")
    assert (code, error) == (2, f"moe-svd-distill: there is no command {typed!r}. Did you mean {meant!r}?\n")


def test_an_option_of_a_command_names_the_help_of_that_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "merge", "a")
    assert (code, error.strip().endswith("Try: moe-svd-distill merge --help")) == (2, True)


def test_init_says_what_comes_next_beside_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = run(capsys, "init", "t", "s")
    assert code == 0
    assert "# tokens: 65536" in out
    assert "Next" not in out
    assert error == "Next, saved as recipe.yaml: moe-svd-distill plan recipe.yaml --calibration TEXT\n"
