"""The recipe: precedence, refusals that name the nearest key, and ranks by pattern."""

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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rnak": 3}, ("rnak", "rank")),
        ({"depthmap": "linear"}, ("depthmap", "depth_map")),
        ({"experts": {"blnd": "uniform"}}, ("experts.blnd", "blend")),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(change: dict[str, Any], words: tuple[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(BASE | change)
    assert all(repr(word) in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": "ful"},
        {"head_rank": 0},
        {"energy": 0.0},
        {"energy": 1.5},
        {"delta_sparsity": 0.0},
        {"workers": 0},
        {"threads": 0},
        {"devices": "tpu"},
        {"projection": "magic"},
        {"depth_map": [0, -1]},
        {"nan": "ignore"},
        {"alpha": 0},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_one_line_with_exit_code_2(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(BASE | change)
    assert caught.value.exit_code == 2
    assert next(iter(change)) in str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_the_output_may_not_be_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="own folder"):
        parse_recipe({"teacher": "t", "student": str(tmp_path), "output": str(tmp_path)})


def test_rank_patterns_override_and_full_means_the_least_dimension() -> None:
    recipe = parse_recipe(BASE | {"rank": 8, "head_rank": "full", "ranks": {"*.self_attn.*": 4, "*.k_proj.*": "full"}})
    assert recipe.rank_of("model.layers.0.mlp.up_proj.weight", "dense.up", (48, 32)) == 8
    assert recipe.rank_of("model.layers.0.self_attn.q_proj.weight", "attention.q", (32, 32)) == 4
    assert recipe.rank_of("model.layers.0.self_attn.k_proj.weight", "attention.k", (16, 32)) == 16
    assert recipe.rank_of("lm_head.weight", "head", (96, 32)) == 32


def test_the_written_recipe_reads_back_the_same_and_has_every_key() -> None:
    recipe = parse_recipe(BASE | {"rank": 12, "experts": {"blend": "uniform"}})
    text = recipe_yaml(recipe)
    assert set(yaml.safe_load(text)) == set(Recipe.model_fields)
    assert parse_recipe(yaml.safe_load(text)) == recipe


@pytest.mark.parametrize("method", ["calibrated", "weights+calibrated"])
def test_a_fit_needs_text_and_a_head_that_may_change(method: str) -> None:
    with pytest.raises(UsageError, match="needs calibration text"):
        parse_recipe(BASE | {"method": method})
    with pytest.raises(UsageError, match="head: keep"):
        parse_recipe(BASE | {"method": method, "calibration": ["text"], "head": "keep"})
    recipe = parse_recipe(BASE | {"method": method, "calibration": [Path("a.txt"), "datasets:name"]})
    assert recipe.calibration == ["a.txt", "datasets:name"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", 511), ("copies", -1), ("copies", 32), ("copies", "many"), ("fit_passes", 0),
        ("head_rank", 0), ("head_rank", "most"), ("head_format", "full"), ("vocabulary", "any"), ("method", "text"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=key):
        parse_recipe(BASE | {key: value})


def test_a_head_rank_of_auto_is_the_usual_one_where_nothing_is_fitted() -> None:
    recipe = parse_recipe(BASE)
    assert recipe.head_rank == "auto"
    assert recipe.rank_of("lm_head.weight", "head", (96, 32)) == 64
