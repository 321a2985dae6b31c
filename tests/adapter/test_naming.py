from __future__ import annotations

import pytest

from moe_svd_distill.adapter.naming import lora_keys, parse_key
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families import Carrier
from moe_svd_distill.families.registry import families

NAMES = sorted(
    {role.name(3, 7) for family in families().values() for role in family.roles if role.carrier is not Carrier.NONE}
)


@pytest.mark.parametrize("hub_name", NAMES)
def test_keys_lead_back_to_their_tensor(hub_name: str) -> None:
    keys = lora_keys(hub_name)
    assert [parse_key(key) for key in keys] == [(hub_name, "A"), (hub_name, "B")]
    assert all(key.startswith("base_model.model.") for key in keys)


def test_a_matrix_keeps_its_hub_name() -> None:
    assert lora_keys("model.layers.0.mlp.experts.3.up_proj.weight") == (
        "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_B.weight",
    )


def test_embeddings_have_keys_of_their_own_without_weight() -> None:
    assert lora_keys("model.embed_tokens.weight") == (
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
    )


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.weight.lora_A.weight", "keeps .weight"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "does not begin with base_model.model."),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A", "does not match this name"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "does not match this name"),
        ("base_model.model.model.embed_tokens.lora_A.weight", "does not match this name"),
        ("base_model.model.lm_head.lora_embedding_A", "does not match this name"),
        ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", "fused experts"),
        ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight", "fused experts"),
        ("base_model.model.model.layers.0.self_attn.q_proj.weight", "not the name of a LoRA tensor"),
        ("base_model.model..lora_A.weight", "not match"),
        ("", "not the name"),
    ],
)
def test_a_name_that_peft_ignores_is_refused_with_the_reason(key: str, reason: str) -> None:
    with pytest.raises(BadDataError, match=reason):
        parse_key(key)


def test_only_weights_get_pairs() -> None:
    with pytest.raises(BadDataError, match=r"ends in \.weight"):
        lora_keys("model.layers.0.self_attn.q_proj.bias")
