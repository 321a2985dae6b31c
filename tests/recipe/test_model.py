"""The recipe: values out of range, what belongs together, and ranks by pattern."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_svd_distill.algebra.divergence import DIVERGENCES
from moe_svd_distill.errors import UsageError
from moe_svd_distill.recipe import TextSource, TrainingRecipe, parse_recipe, recipe_yaml, text_sources

BASE = {"teacher": "t", "student": "s"}


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
        {"preset": "fastest"},
        {"training": {"epochs": 0}},
        {"training": {"learning_rate": 0}},
        {"training": {"divergence": "sideways"}},
        {"training": 3},
    ],
)
def test_values_out_of_range_are_one_line_with_exit_code_2(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(BASE | change)
    assert caught.value.exit_code == 2
    assert next(iter(change)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not re.search("Input|valid|parse|literal", str(caught.value))


def test_every_divergence_is_named_for_people() -> None:
    description = TrainingRecipe.model_fields["divergence"].description or ""
    assert all(name in description for name in DIVERGENCES)


def test_every_key_of_a_written_recipe_has_a_comment_with_its_choices() -> None:
    lines = recipe_yaml(parse_recipe(BASE)).splitlines()
    for number, line in enumerate(lines):
        if line.lstrip()[0] not in "#-":
            assert lines[number - 1].lstrip().startswith("#"), line
    text = " ".join(line.strip("# ") for line in lines)
    for choices in ("[svd, fourier, slice or procrustes]", "[auto or a number (above 0)]", "[auto, muon or adamw]"):
        assert choices in text
    assert "None" not in text
    assert "null" in text


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


def test_the_output_may_not_be_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="own folder"):
        parse_recipe({"teacher": "t", "student": str(tmp_path), "output": str(tmp_path)})


def test_rank_patterns_override_and_full_means_the_least_dimension() -> None:
    recipe = parse_recipe(BASE | {"rank": 8, "head_rank": "full", "ranks": {"*.self_attn.*": 4, "*.k_proj.*": "full"}})
    assert recipe.rank_of("model.layers.0.mlp.up_proj.weight", "dense.up", (48, 32)) == 8
    assert recipe.rank_of("model.layers.0.self_attn.q_proj.weight", "attention.q", (32, 32)) == 4
    assert recipe.rank_of("model.layers.0.self_attn.k_proj.weight", "attention.k", (16, 32)) == 16
    assert recipe.rank_of("lm_head.weight", "head", (96, 32)) == 32


def test_a_head_rank_of_auto_is_the_usual_one_where_nothing_is_fitted() -> None:
    recipe = parse_recipe(BASE)
    assert recipe.head_rank == "auto"
    assert recipe.rank_of("lm_head.weight", "head", (96, 32)) == 64


@pytest.mark.parametrize("method", ["calibrated", "weights+calibrated", "refined"])
def test_a_fit_needs_text_and_a_head_that_may_change(method: str) -> None:
    with pytest.raises(UsageError, match="needs calibration text"):
        parse_recipe(BASE | {"method": method})
    with pytest.raises(UsageError, match="head: keep"):
        parse_recipe(BASE | {"method": method, "calibration": ["text"], "head": "keep"})
    recipe = parse_recipe(BASE | {"method": method, "calibration": [Path("a.txt"), "datasets:name"]})
    assert recipe.calibration == ["a.txt", "datasets:name"]


def test_sources_of_text_with_shares() -> None:
    given = [{"path": Path("a"), "share": 0.3, "field": "body"}, "b"]
    recipe = parse_recipe(BASE | {"calibration": given})
    assert recipe.calibration == [TextSource(path="a", share=0.3, field="body"), "b"]
    assert parse_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe
    thirds = [{"path": name, "share": 0.33} for name in "abc"]
    read = text_sources(parse_recipe(BASE | {"calibration": thirds}).calibration)
    assert [source.share for source in read] == [0.33] * 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"path": "a", "share": 0.5}, {"path": "b", "share": 0.4}], "calibration: the shares sum to 0.9, expected 1"),
        ([{"path": "a", "share": 1.0}, "b"], "the shares sum to 1 and leave nothing for the sources without one"),
        ([{"path": "a", "share": 0}], r"calibration.0.share: expected a number \(above 0, at most 1\), found 0"),
        ([{"path": "a", "shares": 0.5}], r"unknown key 'calibration.0.shares'. Did you mean 'share'"),
        ([{"share": 0.5}], r"calibration.0.path is not given"),
        ([3], "calibration.0: expected text or {path, share, field}, found 3"),
    ],
)
def test_shares_that_do_not_fit_are_refused(given: list[Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_recipe(BASE | {"calibration": given})
