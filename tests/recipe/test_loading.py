"""Recipes from file, environment, command line and preset: precedence, and refusals that name the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_svd_distill.errors import BadDataError, MissingInputError, UsageError
from moe_svd_distill.recipe import (
    PRESET_KEYS,
    PRESETS,
    Recipe,
    TrainingRecipe,
    load_recipe,
    parse_recipe,
    recipe_yaml,
    set_values,
    supplied_values,
)

BASE: dict[str, Any] = {"teacher": "t", "student": "s"}
WITH_TEXT = BASE | {"calibration": ["text"]}


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


@pytest.mark.parametrize("how", ["--set", "environment"])
@pytest.mark.parametrize(
    ("assignment", "key", "expected"),
    [
        ("training.epochs=2", "training", 2.0),
        ("training.learning_rate=1e-4", "training", 1e-4),
        ("experts.blend=uniform", "experts", "uniform"),
        ("rank=full", "rank", "full"),
        ("devices=cuda:0,cuda:1", "devices", ["cuda:0", "cuda:1"]),
        ("calibration=[a.txt, b.txt]", "calibration", ["a.txt", "b.txt"]),
        ("calibration=a.txt", "calibration", ["a.txt"]),
        ("energy=null", "energy", None),
        ("teacher=2024", "teacher", "2024"),
    ],
)
def test_every_key_can_be_set_by_itself(how: str, assignment: str, key: str, expected: Any) -> None:
    path, _, text = assignment.partition("=")
    variable = {f"MOE_SVD_DISTILL_{path.replace('.', '__').upper()}": text}
    given, environment = (set_values([assignment]), {}) if how == "--set" else ({}, variable)
    found = getattr(
        load_recipe(None, {**({} if key == "teacher" else {"teacher": "t"}), "student": "s", **given}, environment), key
    )
    assert (getattr(found, path.partition(".")[2]) if "." in path else found) == expected


def test_ranks_by_pattern_can_be_set_though_patterns_have_dots() -> None:
    assert load_recipe(None, BASE | set_values(["ranks.*.self_attn.*=3"]), {}).ranks == {"*.self_attn.*": 3}


@pytest.mark.parametrize("assignment", ["rank", "=3", ".=3", ""])
def test_assignments_of_another_form_are_refused(assignment: str) -> None:
    with pytest.raises(UsageError, match="expected KEY=VALUE"):
        set_values([assignment])


@pytest.mark.parametrize(
    ("environment", "given", "said"),
    [
        ({"MOE_SVD_DISTILL_RNAK": "3"}, {}, "MOE_SVD_DISTILL_RNAK: unknown key 'rnak'. Did you mean 'rank'"),
        ({"MOE_SVD_DISTILL_TRAINING__EPOCS": "3"}, {}, "MOE_SVD_DISTILL_TRAINING__EPOCS: unknown key 'training.epocs'"),
        ({"MOE_SVD_DISTILL_SEED": "x"}, {}, "MOE_SVD_DISTILL_SEED: seed: expected a whole number"),
        ({}, {"rank": 0}, "the command line: rank: expected full or a whole number \\(at least 1\\), found 0"),
        ({}, {"training": {"epochs": 0}}, "recipe.yaml: training.epochs"),
    ],
)
def test_a_refusal_names_where_the_value_stands(
    environment: dict[str, str], given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(BASE | (given if "training" in given else {})))
    with pytest.raises(UsageError, match=said):
        load_recipe(file, {} if "training" in given else given, environment)


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
    assert values(parse_recipe(WITH_TEXT | {"preset": name})) == expected


def test_every_preset_has_a_name_that_recipes_take() -> None:
    assert {parse_recipe(WITH_TEXT | {"preset": name}).preset for name in PRESETS} == set(PRESETS)


@pytest.mark.parametrize("where", ["file", "environment", "command line"])
def test_a_preset_counts_where_it_stands(where: str, tmp_path: Path) -> None:
    lines = "teacher: t\nstudent: s\ncalibration: [text]\ntokens: 1024\ntraining: {checks: 3}\n"
    file = tmp_path / "recipe.yaml"
    file.write_text(lines + ("preset: best\n" if where == "file" else ""))
    environment = {"MOE_SVD_DISTILL_PRESET": "best"} if where == "environment" else {}
    given = {"preset": "best"} if where == "command line" else {}
    notes: list[str] = []
    recipe = load_recipe(file, given, environment, notes.append)
    tokens = 1024 if where == "file" else 393_216  # what the file says beside its own preset counts more than that
    assert (recipe.preset, *values(recipe), recipe.training.checks) == ("best", "refined", tokens, "auto", 3)
    assert [f"tokens 393216 (not 1024: {file})" in note for note in notes] == ([] if where == "file" else [True])
    beside = {"method": "auto", "tokens": 2048}
    assert values(load_recipe(file, given | beside, environment, notes.append)) == ("auto", 2048, "auto")


def test_what_a_preset_of_the_command_line_takes_the_place_of_is_named_once(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("teacher: t\nstudent: s\ncalibration: text\nmethod: auto\ntokens: 393216\npreset: fast\n")
    notes: list[str] = []
    environment = {"MOE_SVD_DISTILL_METHOD": "calibrated"}
    recipe = load_recipe(file, {"preset": "best"}, environment, notes.append)
    assert values(recipe) == ("refined", 393_216, "auto")
    (note,) = notes  # of tokens the file has the same
    assert note.endswith("below it: method refined (not calibrated: MOE_SVD_DISTILL_METHOD)")
    load_recipe(file, {"preset": "best", "method": "auto"}, environment, notes.append)
    assert len(notes) == 1
    with pytest.warns(UserWarning, match="counts more"):
        load_recipe(file, {"preset": "best"}, environment)


def test_presets_of_a_recipe_that_is_made_in_python() -> None:
    assert Recipe(teacher="t", student="s", preset="fast").tokens == 16_384
    assert Recipe(teacher="t", student="s", preset="fast", tokens=1024).tokens == 1024
    assert values(Recipe(**WITH_TEXT, preset="best")) == ("refined", 393_216, "auto")


def test_a_recipe_of_init_leaves_room_for_presets(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_yaml(parse_recipe(WITH_TEXT), PRESET_KEYS))
    assert load_recipe(file, {}, {}) == parse_recipe(WITH_TEXT)
    notes: list[str] = []
    assert values(load_recipe(file, {"preset": "best"}, {}, notes.append)) == ("refined", 393_216, "auto")
    assert notes == []
    file.write_text(file.read_text().replace("preset: null", "preset: best"))
    assert values(load_recipe(file, {}, {})) == ("refined", 393_216, "auto")


def test_the_command_line_has_the_last_word_on_the_preset() -> None:
    recipe = load_recipe(None, WITH_TEXT | {"preset": "fast"}, {"MOE_SVD_DISTILL_PRESET": "best"})
    assert (recipe.preset, *values(recipe)) == ("fast", "auto", 16_384, "auto")


def test_a_section_as_an_object_keeps_what_was_set_in_it() -> None:
    recipe = parse_recipe(WITH_TEXT | {"preset": "best", "training": TrainingRecipe(checks=3)})
    assert (recipe.training.epochs, recipe.training.checks) == ("auto", 3)
    recipe = parse_recipe(WITH_TEXT | {"preset": "best", "training": TrainingRecipe(epochs=4.0)})
    assert recipe.training.epochs == 4.0


@pytest.mark.parametrize("name", ["balanced", "best"])
def test_training_needs_text(name: str) -> None:
    with pytest.raises(UsageError, match=r"needs calibration text\. Give calibration"):
        parse_recipe({"teacher": "t", "student": "s", "preset": name})


@pytest.mark.parametrize("name", ["quick", 3, ["best"], {"best": 1}])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(UsageError, match="preset: expected fast, balanced or best, found"):
        parse_recipe(WITH_TEXT | {"preset": name})


def test_a_section_that_is_none_is_refused_with_a_preset_too() -> None:
    with pytest.raises(UsageError, match=r"training: expected \{epochs, "):
        parse_recipe(WITH_TEXT | {"preset": "best", "training": 3})


def test_the_resolved_recipe_shows_the_values_and_reads_back_the_same() -> None:
    recipe = parse_recipe(WITH_TEXT | {"preset": "best"})
    written = yaml.safe_load(recipe_yaml(recipe))
    assert (written["preset"], written["tokens"], written["training"]["epochs"]) == ("best", 393_216, "auto")
    assert parse_recipe(written) == recipe
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def test_what_is_taken_from_a_preset_and_what_was_given_otherwise() -> None:
    assert supplied_values(parse_recipe(WITH_TEXT)) == ({}, {})
    recipe = parse_recipe(WITH_TEXT | {"preset": "balanced", "tokens": 1024, "training": {"epochs": 2}})
    assert supplied_values(recipe) == ({"method": "refined"}, {"tokens": 1024})
