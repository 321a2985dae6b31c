"""Presets supply what is given nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_svd_distill.errors import UsageError
from moe_svd_distill.recipe import Recipe, TrainingRecipe, load_recipe, parse_recipe, recipe_yaml
from moe_svd_distill.recipe.presets import PRESETS, supplied_values

BASE: dict[str, Any] = {"teacher": "t", "student": "s", "calibration": ["text"]}


def values(recipe: Recipe) -> tuple[str, int, float | str]:
    """The keys that presets supply."""
    return recipe.method, recipe.tokens, recipe.training.epochs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, ("auto", 65_536, "auto")),
        ("fast", ("auto", 16_384, "auto")),
        ("balanced", ("refined", 131_072, "auto")),
        ("best", ("refined", 393_216, "auto")),
    ],
)
def test_what_each_preset_supplies(name: str | None, expected: tuple[str, int, float | str]) -> None:
    assert values(parse_recipe(BASE | {"preset": name})) == expected


def test_every_preset_has_a_name_that_recipes_take() -> None:
    assert {parse_recipe(BASE | {"preset": name}).preset for name in PRESETS} == set(PRESETS)


@pytest.mark.parametrize("where", ["file", "environment", "command line"])
def test_a_preset_may_be_given_anywhere_and_loses_to_values_given_anywhere(where: str, tmp_path: Path) -> None:
    lines = "teacher: t\nstudent: s\ncalibration: [text]\ntokens: 1024\ntraining: {checks: 3}\n"
    file = tmp_path / "recipe.yaml"
    file.write_text(lines + ("preset: best\n" if where == "file" else ""))
    environment = {"MOE_SVD_DISTILL_PRESET": "best"} if where == "environment" else {}
    given = {"preset": "best"} if where == "command line" else {}
    recipe = load_recipe(file, given, environment)
    assert (recipe.preset, *values(recipe), recipe.training.checks) == ("best", "refined", 1024, "auto", 3)
    recipe = load_recipe(file, given, environment | {"MOE_SVD_DISTILL_TRAINING": "{epochs: 2}"})
    assert (*values(recipe), recipe.training.checks) == ("refined", 1024, 2.0, 3)
    recipe = load_recipe(file, given | {"method": "auto", "tokens": 2048}, environment)
    assert values(recipe) == ("auto", 2048, "auto")


def test_the_command_line_has_the_last_word_on_the_preset() -> None:
    recipe = load_recipe(None, BASE | {"preset": "fast"}, {"MOE_SVD_DISTILL_PRESET": "best"})
    assert (recipe.preset, *values(recipe)) == ("fast", "auto", 16_384, "auto")


def test_a_section_as_an_object_keeps_what_was_set_in_it() -> None:
    recipe = parse_recipe(BASE | {"preset": "best", "training": TrainingRecipe(checks=3)})
    assert (recipe.training.epochs, recipe.training.checks) == ("auto", 3)
    recipe = parse_recipe(BASE | {"preset": "best", "training": TrainingRecipe(epochs=4.0)})
    assert recipe.training.epochs == 4.0


@pytest.mark.parametrize("name", ["balanced", "best"])
def test_training_needs_text(name: str) -> None:
    with pytest.raises(UsageError, match="method refined needs calibration text: give calibration"):
        parse_recipe({"teacher": "t", "student": "s", "preset": name})


@pytest.mark.parametrize("name", ["quick", 3, ["best"], {"best": 1}])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(UsageError, match="preset: Input should be 'fast', 'balanced' or 'best'"):
        parse_recipe(BASE | {"preset": name})


def test_a_section_that_is_none_is_refused_with_a_preset_too() -> None:
    with pytest.raises(UsageError, match="training: Input should be"):
        parse_recipe(BASE | {"preset": "best", "training": 3})


def test_the_resolved_recipe_shows_the_values_and_reads_back_the_same() -> None:
    recipe = parse_recipe(BASE | {"preset": "best"})
    written = yaml.safe_load(recipe_yaml(recipe))
    assert (written["preset"], written["tokens"], written["training"]["epochs"]) == ("best", 393_216, "auto")
    assert parse_recipe(written) == recipe
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def test_what_is_taken_from_a_preset_and_what_was_given_otherwise() -> None:
    assert supplied_values(parse_recipe(BASE)) == ({}, {})
    recipe = parse_recipe(BASE | {"preset": "balanced", "tokens": 1024, "training": {"epochs": 2}})
    assert supplied_values(recipe) == ({"method": "refined"}, {"tokens": 1024})
