"""Pairing: depth maps, missing roles, and no tensor left without a fate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.errors import IncompatiblePairError, UsageError
from moe_svd_distill.pairing.plan import Pairing, pair_models
from moe_svd_distill.pairing.unit import map_depth, with_key
from moe_svd_distill.pipeline.pair import open_model
from moe_svd_distill.recipe import parse_recipe
from tests.support.models import saved


def plan_of(teacher: Path, student: Path, **recipe: Any) -> Pairing:
    models = open_model(str(teacher)), open_model(str(student))
    parsed = parse_recipe({"teacher": str(teacher), "student": str(student), **recipe})
    return pair_models(models[0].layout, models[1].layout, parsed)


def test_the_linear_map_blends_adjacent_layers() -> None:
    blends = map_depth("linear", 2, 3)
    assert blends == (((0, 1.0),), ((1, 0.5), (2, 0.5)))


def test_an_explicit_map_is_taken_as_it_is() -> None:
    blends = map_depth([0, 2.25], 2, 4)
    assert blends[1] == ((2, 0.75), (3, 0.25))
    with pytest.raises(UsageError, match="lists 1 positions, expected 2"):
        map_depth([0], 2, 4)
    with pytest.raises(UsageError, match="teacher layer 4, expected 0 to 3"):
        map_depth([0, 4], 2, 4)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe", "mixtral", "glm4_moe"])
def test_every_student_tensor_is_in_exactly_one_unit(model_type: str, tmp_path: Path) -> None:
    teacher = saved(model_type, tmp_path / "t", num_hidden_layers=3)
    student = saved(model_type, tmp_path / "s", seed=5)
    plan = plan_of(teacher, student)
    names = [task.name for unit in plan.units for task in unit.tasks]
    assert sorted(names) == sorted(open_model(str(student)).checkpoint)
    assert [unit.label for unit in plan.units] == ["layer 0", "layer 1", "embeddings", "head"]
    for unit in plan.units:
        for task in unit.tasks:
            assert task.change == (task.reason == ""), task


def test_a_dense_teacher_leaves_the_experts_alone_and_says_so(tmp_path: Path) -> None:
    plan = plan_of(saved("qwen3", tmp_path / "t"), saved("qwen3_moe", tmp_path / "s"))
    kept = {task.role: task.reason for unit in plan.units for task in unit.tasks if not task.change}
    assert "no routed experts" in kept["experts.gate"]
    assert "attention.q" not in kept
    assert any(name.endswith("mlp.gate_proj.weight") for name in plan.unused_teacher)


def test_different_vocabularies_keep_the_head(tmp_path: Path) -> None:
    plan = plan_of(saved("llama", tmp_path / "t", vocab_size=128), saved("llama", tmp_path / "s"))
    head = next(task for unit in plan.units for task in unit.tasks if task.role == "head")
    assert "vocabulary" in head.reason


def test_tied_embeddings_are_kept(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    plan = plan_of(saved("llama", tmp_path / "t", **tied), saved("llama", tmp_path / "s", **tied), embeddings="delta")
    embedding = next(task for unit in plan.units for task in unit.tasks if task.role == "embedding")
    assert "tied" in embedding.reason


def test_a_pair_without_anything_in_common_is_refused(tmp_path: Path) -> None:
    teacher = saved("llama", tmp_path / "t")
    model = open_model(str(teacher))
    norms = {name: meaning for name, meaning in model.layout.meanings.items() if "norm" in name}
    recipe = parse_recipe({"teacher": "t", "student": str(teacher)})
    bare = replace(model.layout, meanings=norms)
    with pytest.raises(IncompatiblePairError, match="no tensor of the student"):
        pair_models(bare, model.layout, recipe)


def test_keys_depend_on_the_content_and_the_context(tmp_path: Path) -> None:
    plan = plan_of(saved("llama", tmp_path / "t"), saved("llama", tmp_path / "s"), rank=4)
    other = plan_of(tmp_path / "t", tmp_path / "s", rank=5)
    first = {with_key(unit, {"a": 1}).key for unit in plan.units}
    assert len(first) == len(plan.units)
    assert first == {with_key(unit, {"a": 1}).key for unit in plan.units}
    assert first.isdisjoint(with_key(unit, {"a": 2}).key for unit in plan.units)
    assert first.isdisjoint(with_key(unit, {"a": 1}).key for unit in other.units if unit.label.startswith("layer"))
