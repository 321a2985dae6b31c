from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_svd_distill.adapter.naming import lora_keys, parse_key, right_name, whole_key
from moe_svd_distill.errors import BadDataError

WORDS = ["model", "layers", "0", "17", "self_attn", "q_proj", "mlp", "experts", "3", "w1", "base_layer", "gate_up_proj"]
modules = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(".".join)


@given(modules, st.booleans())
def test_keys_lead_back_to_their_module(module: str, embedding: bool) -> None:
    keys = lora_keys(module, embedding=embedding)
    assert [parse_key(key) for key in keys] == [(module, "A"), (module, "B")]
    assert parse_key(whole_key(module)) == (module, "whole")
    assert [right_name(key) for key in keys] == list(keys)


def test_the_keys_are_those_that_peft_writes() -> None:
    assert lora_keys("model.layers.0.mlp.experts.3.up_proj") == (
        "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_B.weight",
    )
    assert lora_keys("model.embed_tokens", embedding=True) == (
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
    )
    assert whole_key("lm_head") == "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.weight.lora_A.weight", "keeps .weight"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "does not begin with base_model.model."),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A", "does not match this name"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "does not match this name"),
        ("base_model.model.model.embed_tokens.lora_embedding_A.weight", "does not match this name"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "does not match this name"),
        ("base_model.model.lm_head.bias", "not the name of a LoRA tensor"),
        ("base_model.model.q_proj.lora_magnitude_vector", "not the name of a LoRA tensor"),
        ("lm_head.weight", "not the name of a LoRA tensor"),
        ("base_model.model..lora_A.weight", "not the name|not match"),
        ("", "not the name"),
    ],
)
def test_a_name_that_peft_ignores_is_refused_with_the_reason(key: str, reason: str) -> None:
    with pytest.raises(BadDataError, match=reason):
        parse_key(key)
