"""The tables of names and settings agree with those of the package `gguf` and of transformers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moe_svd_distill.checkpoints.llama_cpp.config import config_of
from moe_svd_distill.checkpoints.llama_cpp.header import Settings
from moe_svd_distill.checkpoints.llama_cpp.names import NAMINGS, OUTSIDE
from moe_svd_distill.checkpoints.llama_cpp.survey import origin_of
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.files.header import TensorInfo

gguf = pytest.importorskip("gguf")
from pathlib import Path  # noqa: E402

from tests.support.gguf_files import ARCHITECTURES  # noqa: E402

_SPLIT_BY_US = ("attn_k_b", "attn_v_b", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@pytest.mark.parametrize("model_type", NAMINGS)
def test_names_are_the_package_s(model_type: str) -> None:
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[model_type]], 1)
    for name, hub in OUTSIDE.items():
        assert table.get_name(hub, try_suffixes=(".weight",)) == name
    for name, hub in NAMINGS[model_type].leaves.items():
        # The converter has its own spelling for Mixtral's experts.
        asked = re.sub(r"^block_sparse_moe\.experts", "feed_forward.experts", hub.replace(".{}", ""))
        keys = [f"model.layers.0.{asked}", f"layers.0.{asked}"]
        assert f"blk.0.{name}" in [table.get_name(key) for key in keys], hub


def settings(architecture: str, values: dict[str, Any], **general: Any) -> Settings:
    tensors = {"token_embd.weight": TensorInfo("token_embd.weight", (50, 32), "F32", 6400, Path("x"), 0)}
    always = {
        **{"context_length": 99, "block_count": 3, "embedding_length": 32, "feed_forward_length": 48},
        **{"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5},
        **{"rope.freq_base": 5000.0},
    }
    metadata = {f"{architecture}.{key}": value for key, value in {**always, **values}.items()}
    return Settings("x.gguf", architecture, {**metadata, **general}, tensors)


@pytest.mark.parametrize(
    ("architecture", "theirs", "values"),
    [
        ("llama", "llama", {"rope.dimension_count": 8, "vocab_size": 50}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"attention.key_length": 8}),
        (
            *("qwen3moe", "qwen3_moe"),
            {"attention.key_length": 8, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16},
        ),
        ("gemma3", "gemma3", {"attention.key_length": 8, "attention.sliding_window": 6}),
    ],
)
def test_settings_are_what_transformers_makes_of_them(architecture: str, theirs: str, values: dict[str, Any]) -> None:
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    given = settings(architecture, values)
    config = config_of(given, None)
    rope = config["rope_parameters"]
    flat = {**config, "rope_theta": rope.get("full_attention", rope)["rope_theta"]}
    flat.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key, field in GGUF_CONFIG_MAPPING[theirs].items():
        value = given.metadata.get(f"{architecture}.{key}")
        if value is not None and field is not None:
            assert flat[field] == value, key
    for field, value in GGUF_CONFIG_DEFAULTS_MAPPING.get(theirs, {}).items():
        assert config[field] == value
    assert not given.unused()


def test_settings_that_nothing_is_made_of_are_named() -> None:
    given = settings("qwen2", {"attention.scale": 0.5, "logit_scale": 2.0})
    config_of(given, None)
    assert given.unused() == ["qwen2.attention.scale", "qwen2.logit_scale"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.dimension_count": 4}, "turns 4 dimensions of a head with 8"),
        ({"attention.head_count_kv": (2, 1, 2)}, "another qwen2.attention.head_count_kv for each layer"),
        ({"block_count": None}, "does not say qwen2.block_count"),
    ],
)
def test_settings_that_cannot_be_said_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(BadDataError, match=words):
        config_of(settings("qwen2", values), None)


def test_scalings_of_rotary_positions() -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    assert config_of(settings("qwen2", linear), None)["rope_parameters"] == {
        "rope_type": "linear",
        "factor": 8.0,
        "rope_theta": 5000.0,
    }
    gemma = config_of(settings("gemma3", linear | {"attention.sliding_window": 6}), None)["rope_parameters"]
    assert gemma["full_attention"]["factor"] == 8.0
    assert gemma["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    plain = config_of(settings("llama", {}), [1.0, 1.0, 1.0, 1.0])["rope_parameters"]
    assert plain["rope_type"] == "default"
    with pytest.raises(BadDataError, match="otherwise than Llama 3"):
        config_of(settings("llama", {}), [3.0, 1.0, 7.0, 2.0])


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({}, None),
        ({"general.source.url": "https://example.org/paper.pdf"}, None),
        ({"general.source.url": "https://huggingface.co/org/model-7B"}, "org/model-7B"),
        ({"general.source.huggingface.repository": "org/name"}, "org/name"),
        ({"general.base_model.0.repo_url": "https://huggingface.co/org/base"}, "org/base"),
        (
            {
                "general.base_model.0.repo_url": "https://huggingface.co/org/base",
                "general.source.repo_url": "https://huggingface.co/org/tuned/tree/main",
            },
            "org/tuned",
        ),
    ],
)
def test_the_checkpoint_that_a_file_was_made_from(metadata: dict[str, Any], found: str | None) -> None:
    origin = origin_of(metadata)
    assert (origin and origin[0]) == found
