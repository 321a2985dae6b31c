from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

# GONE ['check_agreement']
from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.naming import lora_keys
from moe_svd_distill.adapter.pair_shapes import pair_shapes
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families.registry import families
from tests.adapter import tiny
from tests.adapter.conftest import Case

Shapes = dict[str, tuple[int, ...]]


def shapes_of(case: Case) -> Shapes:
    return {key: tuple(value.shape) for key, value in case.pairs.items()}


def build(case: Case, shapes: Shapes, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"base_model": "organisation/student", "student_layers": tiny.LAYERS} | changes
    return build_configuration(shapes, families()[case.name], **arguments)


def without(shapes: Shapes, *hub_names: str) -> Shapes:
    keys = {key for name in hub_names for key in lora_keys(name)}
    assert keys <= shapes.keys()
    return {key: shape for key, shape in shapes.items() if key not in keys}


def with_rank(shapes: Shapes, pattern: str, rank: int) -> Shapes:
    changed = dict(shapes)
    for key, (first, second) in shapes.items():
        if re.search(pattern, key):
            changed[key] = (rank, second) if "lora_A" in key else (first, rank)
    assert changed != shapes
    return changed


def test_explicit_configuration_of_a_family_with_everything(sparse: Case) -> None:
    found = build(sparse, shapes_of(sparse))
    assert found["target_modules"] == ["lm_head", "q_proj", "k_proj", "v_proj", "o_proj"]
    assert found["target_parameters"] == [
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
        "mlp.shared_experts.down_proj.weight",
        "mlp.gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    ]
    assert (found["r"], found["lora_alpha"], found["peft_type"], found["task_type"]) == (4, 4, "LORA", "CAUSAL_LM")
    assert found["rank_pattern"] == {r".*\.experts\.gate_up_proj": 8, "lm_head": 8}
    assert found["base_model_name_or_path"] == "organisation/student"


def test_alpha_always_equals_rank(case: Case) -> None:
    shapes = with_rank(with_rank(shapes_of(case), r"layers\.1\..*q_proj", 2), "o_proj", 3)
    found = build(case, shapes)
    assert found["lora_alpha"] == found["r"]
    assert found["alpha_pattern"] == found["rank_pattern"]
    scales = check_agreement(pair_shapes(shapes), families()[case.name], found).scales
    assert set(scales.values()) == {1.0}


def test_the_order_of_the_tensors_does_not_matter(case: Case) -> None:
    shapes = with_rank(shapes_of(case), r"layers\.1\..*q_proj", 2)
    keys = list(shapes)
    random.Random(0).shuffle(keys)
    assert json.dumps(build(case, {key: shapes[key] for key in keys})) == json.dumps(build(case, shapes))


def test_layers_that_differ_are_listed(dense: Case) -> None:
    shapes = with_rank(shapes_of(dense), r"layers\.[02]\..*q_proj", 2)
    assert build(dense, shapes)["rank_pattern"] == {
        "lm_head": 8,
        r"model\.layers\.(?:0|2)\.self_attn\.q_proj": 2,
    }


def test_a_head_alone_gives_the_rank(dense: Case) -> None:
    shapes = {key: shape for key, shape in shapes_of(dense).items() if "lm_head" in key}
    found = build(dense, shapes)
    assert (found["r"], found["rank_pattern"], found["target_modules"]) == (8, {}, ["lm_head"])


def test_gate_and_up_of_the_experts_add_up(sparse: Case) -> None:
    shapes = with_rank(shapes_of(sparse), r"experts\.\d+\.(gate|up)_proj", 6)
    assert build(sparse, shapes)["rank_pattern"][r".*\.experts\.gate_up_proj"] == 12


def test_experts_alone_or_dense_layers_alone_are_whole(sparse: Case) -> None:
    shapes = shapes_of(sparse)
    experts = {key: shape for key, shape in shapes.items() if ".experts." in key}
    assert build(sparse, experts)["target_modules"] == []
    first = {key: shape for key, shape in shapes.items() if "layers.0.mlp." in key}
    assert build(sparse, first)["target_parameters"][0] == "mlp.gate_proj.weight"


@pytest.mark.parametrize("embedding", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings_have_no_pair(dense: Case, embedding: str) -> None:
    key_a, key_b = lora_keys(embedding)
    rows = 64
    shapes = shapes_of(dense) | {key_a: (4, 32), key_b: (rows, 4)}
    if "embed" in embedding:
        shapes = without(shapes, "lm_head.weight") | {key_a: (4, rows), key_b: (32, 4)}
    assert build(dense, shapes)
    with pytest.raises(BadDataError, match="ties its head"):
        build(dense, shapes, tied_embeddings=True)


@pytest.mark.parametrize(
    ("hub_name", "message"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.weight has no LoRA pair"),
        ("model.layers.2.mlp.experts.3.up_proj.weight", r"layers.2.mlp.experts.3.up_proj.weight has no LoRA pair"),
        ("model.layers.1.mlp.experts.0.down_proj.weight", r"layers.1.mlp.experts.0.down_proj.weight has no LoRA pair"),
        ("model.layers.2.mlp.gate.weight", r"layers.2.mlp.gate.weight has no LoRA pair"),
        ("model.layers.1.mlp.shared_experts.down_proj.weight", "layers.1.mlp.shared_experts.down_proj.weight has no"),
    ],
)
def test_a_hole_in_a_class_is_named(sparse: Case, hub_name: str, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        build(sparse, without(shapes_of(sparse), hub_name))


def test_a_class_may_be_left_out_altogether(case: Case) -> None:
    names = [name for name in tiny.carried(case.student) if ".q_proj" in name or name == "lm_head.weight"]
    found = build(case, without(shapes_of(case), *names))
    assert not {"q_proj", "lm_head"} & set(found["target_modules"])


def test_layers_without_any_pair_are_left_out_by_name(sparse: Case) -> None:
    carried = tiny.carried(sparse.student)
    names = [name for name in carried if ".layers.2." in name]
    found = build(sparse, without(shapes_of(sparse), *names))
    entries = [*found["target_modules"], *found["target_parameters"]]
    assert {entry.split(".")[2] for entry in entries if entry.startswith("model.layers.")} == {"0", "1"}
    bare = {entry for entry in entries if not entry.startswith("model.")}
    assert bare == {"lm_head"}  # the bare name of a class would reach layer 2 as well


def test_a_class_with_a_hole_in_a_layer_that_has_other_pairs_is_refused(sparse: Case) -> None:
    with pytest.raises(BadDataError, match=r"layers\.2\.self_attn\.q_proj"):
        build(sparse, without(shapes_of(sparse), "model.layers.2.self_attn.q_proj.weight"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "only the layers 0 to 2"),
        ("model.layers.0.input_layernorm.weight", "no LoRA pair can carry"),
        ("model.layers.0.self_attn.kv_b_proj.weight", "has no such tensor"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", "dense MLP and of experts"),
    ],
)
def test_a_pair_without_a_place_is_refused(sparse: Case, extra: str, message: str) -> None:
    key_a, key_b = lora_keys(extra)
    with pytest.raises(BadDataError, match=message):
        build(sparse, shapes_of(sparse) | {key_a: (4, 32), key_b: (32, 4)})


def test_half_a_pair_and_odd_ranks_are_refused(dense: Case, sparse: Case) -> None:
    shapes = shapes_of(dense)
    key_a, key_b = lora_keys("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(BadDataError, match=r"lora_B\.weight is missing"):
        build(dense, {key: shape for key, shape in shapes.items() if key != key_b})
    with pytest.raises(BadDataError, match="A is 4×32 and B is 32×5"):
        build(dense, shapes | {key_b: (32, 5)})
    with pytest.raises(BadDataError, match="A is 4 and B"):
        build(dense, shapes | {key_a: (4,)})
    with pytest.raises(BadDataError, match="no LoRA tensors"):
        build(dense, {})
    with pytest.raises(BadDataError, match="like the layer's other experts"):
        build(sparse, with_rank(shapes_of(sparse), r"layers\.1\.mlp\.experts\.2\.up_proj", 3))


def test_experts_need_all_three_projections(sparse: Case) -> None:
    names = [name for name in tiny.carried(sparse.student) if re.search(r"experts\.\d+\.up_proj", name)]
    with pytest.raises(BadDataError, match="no LoRA pairs of up_proj"):
        build(sparse, without(shapes_of(sparse), *names))
