"""Planted symmetry: permuted experts, neurons and heads are all found, and the teacher comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_svd_distill.pipeline.pair import open_model
from tests.support.pairs import FAMILIES, delta, planted_pair, recipe_for, records, run_units
from tests.support.planted import matrix_in

TYPES = (*FAMILIES, "gpt_oss", "llama4_text", "granitemoe", "phi3", "glm4", "qwen2_moe", "mistral4")


@pytest.mark.parametrize("model_type", TYPES)
def test_every_permutation_is_found(model_type: str, tmp_path: Path) -> None:
    teacher, student, planted = planted_pair(model_type, tmp_path, noise=0.05)
    contents = run_units(recipe_for(teacher, student, tmp_path / "out", rank=4))
    layout = open_model(str(student)).layout
    rows = records(contents)
    assert planted.neurons
    for (prefix, layer, expert), order in planted.neurons.items():
        for side in ("gate", "up", "down"):
            row = rows[str(layout.find(f"{prefix}.{side}", layer, expert))]
            assert row["alignment"] == "neurons permuted"
            assert row["permutation"] == order
    for layer, order in planted.heads.items():
        assert rows[str(layout.find("attention.q", layer))]["permutation"]["query_heads"] == order
    facts = {unit.layer: content.record.get("experts") for unit, content in contents}
    for layer, order in planted.experts.items():
        assert facts[layer]["cluster_of_student_expert"] == order


@pytest.mark.parametrize("model_type", TYPES)
def test_the_full_rank_delta_leads_to_the_permuted_teacher(model_type: str, tmp_path: Path) -> None:
    teacher, student, _ = planted_pair(model_type, tmp_path, noise=0.02)
    contents = run_units(recipe_for(teacher, student, tmp_path / "out", rank="full", head_rank="full", dtype="float32"))
    exact = planted_pair(model_type, tmp_path / "exact", noise=0.0)[2].tensors
    own = open_model(str(student))
    for name, row in records(contents).items():
        if row["fate"] == "lora":
            view = own.layout.meanings[name].view
            target = matrix_in(own.checkpoint.read(view.stored), view).float() + delta(contents, name)
            assert torch.allclose(target, matrix_in(exact[view.stored], view).float(), atol=2e-6), name


def test_alignment_can_be_switched_off(tmp_path: Path) -> None:
    teacher, student, _ = planted_pair("qwen3_moe", tmp_path)
    rows = records(run_units(recipe_for(teacher, student, tmp_path / "out", alignment="none", rank=4)))
    assert not any("permutation" in row for row in rows.values())
    assert rows["model.layers.0.self_attn.q_proj.weight"]["relative_delta"] > 0.5


def test_unrelated_models_show_no_correspondence(tmp_path: Path) -> None:
    from tests.support.models import saved

    teacher, student = saved("qwen3", tmp_path / "t", seed=1), saved("qwen3", tmp_path / "s", seed=2)
    rows = records(run_units(recipe_for(teacher, student, tmp_path / "out", rank=4)))
    assert rows["model.layers.0.mlp.up_proj.weight"]["alignment"] == "none: no correspondence of neurons"
    assert rows["model.layers.0.self_attn.q_proj.weight"]["alignment"] == "none: no correspondence of heads"
