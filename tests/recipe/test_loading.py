"""Recipes from file, environment and command line: precedence, and refusals that name the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_svd_distill.errors import BadDataError, MissingInputError, UsageError
from moe_svd_distill.recipe import Recipe, load_recipe, parse_recipe, recipe_yaml

BASE = {"teacher": "t", "student": "s"}


def test_precedence_is_command_line_then_environment_then_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("teacher: t\nstudent: s\nrank: 8\nseed: 1\nworkers: 3\n")
    recipe = load_recipe(file, {"rank": 32}, {"MOE_SVD_DISTILL_RANK": "16", "MOE_SVD_DISTILL_SEED": "7"})
    assert (recipe.rank, recipe.seed, recipe.workers) == (32, 7, 3)


def test_sections_are_joined_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("teacher: t\nstudent: s\ntraining: {epochs: 2, checks: 5, patience: 9}\nranks: {a: 1, b: 2}\n")
    environment = {"MOE_SVD_DISTILL_TRAINING": "{epochs: 3, checks: 6}", "MOE_SVD_DISTILL_RANKS": "{b: 3}"}
    recipe = load_recipe(file, {"training": {"epochs": 4}}, environment)
    assert (recipe.training.epochs, recipe.training.checks, recipe.training.patience) == (4, 6, 9)
    assert recipe.ranks == {"b": 3}  # no section: the order of patterns decides


def test_the_start_from_the_environment_is_text() -> None:
    training = BASE | {"method": "refined", "calibration": ["text.txt"]}
    assert load_recipe(None, training, {"MOE_SVD_DISTILL_START": "2024"}).start == "2024"
    with pytest.raises(UsageError, match="trains nothing"):
        load_recipe(None, BASE, {"MOE_SVD_DISTILL_START": "2024"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rnak": 3}, ("rnak", "rank")),
        ({"depthmap": "linear"}, ("depthmap", "depth_map")),
        ({"experts": {"blnd": "uniform"}}, ("experts.blnd", "blend")),
        ({"training": {"epocs": 3}}, ("training.epocs", "epochs")),
        ({"training": {"learning_rte": 3}, "preset": "fast"}, ("training.learning_rte", "learning_rate")),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(change: dict[str, Any], words: tuple[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(BASE | change)
    assert all(repr(word) in str(caught.value) for word in words)


def test_missing_models_are_named() -> None:
    with pytest.raises(UsageError, match="student is not given"):
        parse_recipe({"teacher": "t"})


def test_a_recipe_that_is_not_there_or_not_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        load_recipe(tmp_path / "none.yaml", {}, {})
    bad = tmp_path / "bad.yaml"
    bad.write_text("- a\n- b\n")
    with pytest.raises(BadDataError, match="list"):
        load_recipe(bad, {}, {})
    bad.write_text("a: [1\n")
    with pytest.raises(BadDataError, match="YAML"):
        load_recipe(bad, {}, {})


def test_the_written_recipe_reads_back_the_same_and_has_every_key() -> None:
    recipe = parse_recipe(
        BASE | {"rank": 12, "experts": {"blend": "uniform"}, "preset": "fast", "training": {"epochs": 2.5}}
    )
    text = recipe_yaml(recipe)
    assert set(yaml.safe_load(text)) == set(Recipe.model_fields)
    assert parse_recipe(yaml.safe_load(text)) == recipe
