"""Any teacher for any student: other widths, heads, experts and depths, dense and mixtures, both kinds of attention."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.pairing.plan import EXPERTS, Pairing
from moe_svd_distill.pipeline.pair import open_model, open_pair
from moe_svd_distill.pipeline.units import plan_pair
from tests.support import architectures
from tests.support.models import save
from tests.support.pairs import delta, recipe_for, run_units, with_tensors

TYPES = ("llama", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss")
LATENT, DENSE, SHARED = {"deepseek_v3"}, {"llama"}, {"deepseek_v3", "glm4_moe"}
COUNT = 6
WIDE: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3, "intermediate_size": 56}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Teachers of 3 layers, wider and with more experts; students of 4 layers."""
    folder = tmp_path_factory.mktemp("models")
    experts = {"qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts", "glm4_moe": "n_routed_experts"}
    made: dict[str, dict[str, Path]] = {"teacher": {}, "student": {}}
    for kind in TYPES:
        wide = WIDE | ({} if kind in DENSE else {experts.get(kind, "num_local_experts"): COUNT})
        wide |= {"num_key_value_heads": 6 if kind in LATENT else 3}
        made["teacher"][kind] = architectures.saved(kind, folder / f"t-{kind}", seed=1, **wide)
        made["student"][kind] = architectures.saved(kind, folder / f"s-{kind}", seed=2)
    return made


def plan_of(teacher: Path, student: Path) -> Pairing:
    with open_pair(str(teacher), str(student)) as pair:
        return plan_pair(recipe_for(teacher, student, Path("out")), pair)


@pytest.mark.parametrize(("teacher", "student"), list(product(TYPES, TYPES)))
def test_every_pair_gives_a_lora_pair_or_a_reason(
    teacher: str, student: str, models: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    folders = models["teacher"][teacher], models["student"][student]
    contents = run_units(recipe_for(*folders, tmp_path / "out", rank=3, head_rank=2))
    changed: set[str] = set()
    for unit, content in contents:
        rows = {row["name"]: row for row in content.record["tensors"]}
        assert set(rows) == {task.name for task in unit.tasks}
        for task in unit.tasks:
            made = [content.tensors.get(f"{task.name}#{side}") for side in "AB"]
            if not task.change:
                assert made == [None, None]
                assert rows[task.name]["reason"] == task.reason != ""
                continue
            right, left = made
            assert right is not None
            assert left is not None
            changed.add(task.role)
            rank = rows[task.name]["rank"]
            assert (left.shape, right.shape) == ((task.shape[0], rank), (rank, task.shape[1]))
            assert bool(torch.isfinite(left).all() and torch.isfinite(right).all())
            assert rank >= 1
            assert float((left.float() @ right.float()).norm()) > 0
    with open_pair(*map(str, folders)) as pair:
        covered = {task.view.stored for unit, _ in contents for task in unit.tasks}
        assert covered == set(pair.student.checkpoint)
    expected = {"head"}
    if (teacher in LATENT) == (student in LATENT):
        sides = ("q_a", "q_b", "kv_a", "kv_b", "o") if student in LATENT else ("q", "k", "v", "o")
        expected |= {f"attention.{side}" for side in sides}
    if teacher not in DENSE and student not in DENSE:
        expected |= {"router", *EXPERTS}
    gated = ("gate", "up", "down")
    if student in DENSE | SHARED and teacher in DENSE | SHARED:
        expected |= {f"dense.{side}" for side in gated}
    if student in SHARED and teacher in SHARED:
        expected |= {f"shared.{side}" for side in gated}
    assert changed == expected


@pytest.mark.parametrize(
    ("teacher", "student", "role", "reason"),
    [
        ("llama", "mixtral", "experts.up", "teacher layer 0 has no routed experts"),
        ("llama", "mixtral", "router", "teacher layer 0 has no routed experts"),
        ("mixtral", "llama", "dense.gate", "teacher layer 0 has no dense.gate"),
        ("deepseek_v3", "llama", "attention.q", "teacher layer 0 has latent attention, this layer attention"),
        ("llama", "deepseek_v3", "attention.kv_b", "teacher layer 0 has attention, this layer latent attention"),
        ("qwen3_moe", "gpt_oss", "experts.gate_up.bias", "no LoRA can carry a bias"),
        (
            "gpt_oss",
            "qwen3_moe",
            "norm.mlp",
            "no LoRA can carry a norm; widths differ, so the teacher's gain is left out",
        ),
    ],
)
def test_the_reasons(teacher: str, student: str, role: str, reason: str, models: dict[str, dict[str, Path]]) -> None:
    plan = plan_of(models["teacher"][teacher], models["student"][student])
    assert next(t.reason for unit in plan.units for t in unit.tasks if t.role == role).startswith(reason)


def test_every_teacher_tensor_is_used_or_has_a_reason(models: dict[str, dict[str, Path]]) -> None:
    for teacher, student in product(TYPES, TYPES):
        folders = models["teacher"][teacher], models["student"][student]
        plan = plan_of(*folders)
        used = {
            source.view.name for unit in plan.units for task in unit.tasks for source in task.sources if task.change
        }
        used |= {source.view.name for unit in plan.units for norm in unit.norms for source in norm.sources}
        if teacher not in DENSE and student not in DENSE:
            layers = [layer for unit in plan.units for layer in unit.teacher_experts]
            used |= {layer.router.name for layer in layers}
            used |= {view.name for layer in layers for views in layer.tensors for view in views}
        with open_pair(*map(str, folders)) as pair:
            names = set(pair.teacher.layout.meanings) | set(pair.teacher.layout.ignored)
        assert used | set(plan.unused_teacher) == names, (teacher, student)
        assert not used & set(plan.unused_teacher)


def test_other_activations_are_noted(models: dict[str, dict[str, Path]]) -> None:
    notes = plan_of(models["teacher"]["gpt_oss"], models["student"]["mixtral"]).notes
    assert notes[0].startswith("the MLPs of the teacher compute silu clamped at 7.0, those of the student silu")
    assert not plan_of(models["teacher"]["llama"], models["student"]["mixtral"]).notes


def test_linear_attention_has_no_role_and_the_rest_of_the_layer_goes_on(tmp_path: Path) -> None:
    folder = architectures.saved("qwen3_5_moe", tmp_path / "m", seed=1)
    other = architectures.saved("qwen3_5_moe", tmp_path / "o", seed=2)
    plan = plan_of(folder, other)
    changed = {task.role for unit in plan.units for task in unit.tasks if task.change}
    assert {"attention.gated_q", "attention.k", "attention.o", "experts.up", "router", "shared.expert_gate"} <= changed
    prefix = "model.language_model.layers.0.linear_attn."
    assert "linear attention" in plan.ignored_student[f"{prefix}out_proj.weight"]
    assert any("image" in reason for reason in plan.ignored_student.values())
    mixed = plan_of(folder, architectures.saved("qwen3_moe", tmp_path / "q", seed=3))
    reasons = {task.reason for unit in mixed.units for task in unit.tasks if task.role == "attention.q"}
    assert "teacher layer 1 has attention with a gated output, this layer attention" in reasons


FOLDED: dict[str, dict[str, str | None]] = {  # matrix of layer 1 to the norm before it
    "gemma2": {
        "self_attn.q_proj.weight": "input_layernorm",
        "self_attn.o_proj.weight": None,
        "mlp.gate_proj.weight": "pre_feedforward_layernorm",
    },
    "glm4": {"self_attn.v_proj.weight": "input_layernorm", "mlp.gate_up_proj.weight.up": "post_attention_layernorm"},
    "olmo2": {"self_attn.q_proj.weight": None, "mlp.up_proj.weight": None},
    "phi3": {
        "self_attn.qkv_proj.weight.k": "input_layernorm",
        "mlp.gate_up_proj.weight.gate": "post_attention_layernorm",
    },
    "deepseek_v3": {
        "self_attn.q_b_proj.weight": "self_attn.q_a_layernorm",
        "mlp.gate.weight": "post_attention_layernorm",
    },
}


@pytest.mark.parametrize("model_type", sorted(FOLDED))
def test_the_gain_of_the_norm_before_a_matrix_is_folded_and_no_other(model_type: str, tmp_path: Path) -> None:
    folders = [architectures.saved(model_type, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    values = {"rank": "full", "dtype": "float32", "alignment": "none", "experts": {"assignment": "index"}}
    contents = run_units(recipe_for(*folders, tmp_path / "o", **values))
    teacher, student = (open_model(str(folder)) for folder in folders)
    one_more = 1.0 if model_type == "gemma2" else 0.0
    for below, norm in FOLDED[model_type].items():
        name = f"model.layers.1.{below}"
        view = student.layout.meanings[name].view
        own, wanted = (view.within(model.checkpoint.read(view.stored)) for model in (student, teacher))
        gains = torch.ones(2, own.shape[1])
        if norm is not None:
            stored = f"model.layers.1.{norm}.weight"
            gains = torch.stack([model.checkpoint.read(stored) + one_more for model in (student, teacher)])
            assert not torch.allclose(gains[0], gains[1], atol=1e-2)
        assert torch.allclose((own + delta(contents, name)) * gains[0], wanted * gains[1], atol=1e-5), name


def test_quantised_experts_of_one_tensor_give_what_their_plain_copies_give(tmp_path: Path) -> None:
    """MXFP4, six experts for the student's four: pieces of them are dequantised for the clusters."""
    wide = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": COUNT, "num_hidden_layers": 3}
    model = save(architectures.build("gpt_oss", 1, **wide), tmp_path / "model")
    coded, generator = read_all(model), torch.Generator().manual_seed(0)
    for name in [name for name in coded if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = coded.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator)
        scales = torch.randint(119, 125, (experts, rows, columns // 32), generator=generator)
        coded |= {f"{name}_blocks": blocks.to(torch.uint8), f"{name}_scales": scales.to(torch.uint8)}
    quantised = with_tensors(model, tmp_path / "quantised", coded)
    config = json.loads((quantised / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (quantised / "config.json").write_text(json.dumps(config))
    copy = with_tensors(model, tmp_path / "copy", read_all(quantised))
    student = architectures.saved("gpt_oss", tmp_path / "student", seed=2)
    made = [run_units(recipe_for(teacher, student, tmp_path / "out", rank=3)) for teacher in (quantised, copy)]
    for (_, first), (_, second) in zip(*made, strict=True):
        assert first.tensors.keys() == second.tensors.keys()
        assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_model(str(folder)).checkpoint
    return {name: checkpoint.read(name) for name in checkpoint}
