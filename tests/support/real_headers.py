"""Headers of models as they are on the hub: names, shapes and dtypes, in sparse files without weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]
_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-Coder-480B-A35B": {
        **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "torch_dtype": "bfloat16"},
        **{"hidden_size": 6144, "num_hidden_layers": 62, "num_attention_heads": 96, "num_key_value_heads": 8},
        **{"head_dim": 128, "intermediate_size": 8192, "moe_intermediate_size": 2560, "num_experts": 160},
        **{"num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False, "hidden_act": "silu"},
    },
    "Qwen3-30B-A3B": {
        **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "torch_dtype": "bfloat16"},
        **{"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
        **{"head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128},
        **{"num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False, "hidden_act": "silu"},
    },
    "GLM-4.6": {
        **{"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "torch_dtype": "bfloat16"},
        **{"hidden_size": 5120, "num_hidden_layers": 92, "num_attention_heads": 96, "num_key_value_heads": 8},
        **{"head_dim": 128, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160},
        **{"n_shared_experts": 1, "first_k_dense_replace": 3, "num_experts_per_tok": 8, "vocab_size": 151552},
        **{"num_nextn_predict_layers": 1, "use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False},
    },
    "DeepSeek-V3": {
        **{"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16"},
        **{"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128},
        **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256},
        **{"n_shared_experts": 1, "first_k_dense_replace": 3, "num_experts_per_tok": 8, "vocab_size": 129280},
        **{"num_nextn_predict_layers": 1, "tie_word_embeddings": False, "quantization_config": _FP8},
    },
    "Kimi-K2": {
        **{"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16"},
        **{"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64},
        **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 384},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 8, "vocab_size": 163840},
        **{"num_nextn_predict_layers": 0, "tie_word_embeddings": False, "quantization_config": _FP8},
    },
    "gpt-oss-120b": {
        **{"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_act": "silu", "head_dim": 64},
        **{"hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8},
        **{"intermediate_size": 2880, "num_local_experts": 128, "num_experts_per_tok": 4, "vocab_size": 201088},
        **{"swiglu_limit": 7.0, "attention_bias": True, "tie_word_embeddings": False},
        "quantization_config": {"quant_method": "mxfp4"},
    },
}
"""The fields of the published config.json files that sizes follow from."""


def write(model: str, folder: Path, shard_bytes: int = 5_000_000_000) -> Path:
    """Shards with valid headers and holes for data, their index and config.json; returns the folder."""
    folder.mkdir(parents=True)
    config = CONFIGS[model]
    shards: list[Tensors] = [{}]
    size = 0
    for name, (dtype, shape) in _MAKERS[str(config["model_type"])](config):
        needed = _size(dtype, shape)
        if size and size + needed > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += needed
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _size(dtype: str, shape: Shape) -> int:
    size = _BYTES[dtype]
    for length in shape:
        size *= length
    return size


def _write_shard(path: Path, tensors: Tensors) -> None:
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + _size(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


Entry = tuple[str, tuple[str, Shape]]


def _plain(name: str, *shape: int, dtype: str = "BF16") -> Iterator[Entry]:
    yield name, (dtype, shape)


def _fp8(name: str, *shape: int) -> Iterator[Entry]:
    yield name, ("F8_E4M3", shape)
    yield f"{name}_scale_inv", ("F32", tuple(-(-length // 128) for length in shape))


Linear = Callable[..., Iterator[Entry]]


def _gated(path: str, hidden: int, width: int, linear: Linear) -> Iterator[Entry]:
    for side in ("gate", "up"):
        yield from linear(f"{path}.{side}_proj.weight", width, hidden)
    yield from linear(f"{path}.down_proj.weight", hidden, width)


def _grouped_attention(base: str, c: dict[str, Any], norms: bool, biases: str) -> Iterator[Entry]:
    size = c["head_dim"]
    queries, keys, hidden = c["num_attention_heads"] * size, c["num_key_value_heads"] * size, c["hidden_size"]
    for side, rows in (("q", queries), ("k", keys), ("v", keys), ("o", hidden)):
        yield from _plain(f"{base}.{side}_proj.weight", rows, queries if side == "o" else hidden)
        if side in biases:
            yield from _plain(f"{base}.{side}_proj.bias", rows)
        if norms and side in "qk":
            yield from _plain(f"{base}.{side}_norm.weight", size)


def _latent_attention(base: str, c: dict[str, Any]) -> Iterator[Entry]:
    heads, hidden, rope = c["num_attention_heads"], c["hidden_size"], c["qk_rope_head_dim"]
    yield from _fp8(f"{base}.q_a_proj.weight", c["q_lora_rank"], hidden)
    yield from _plain(f"{base}.q_a_layernorm.weight", c["q_lora_rank"])
    yield from _fp8(f"{base}.q_b_proj.weight", heads * (c["qk_nope_head_dim"] + rope), c["q_lora_rank"])
    yield from _fp8(f"{base}.kv_a_proj_with_mqa.weight", c["kv_lora_rank"] + rope, hidden)
    yield from _plain(f"{base}.kv_a_layernorm.weight", c["kv_lora_rank"])
    yield from _fp8(f"{base}.kv_b_proj.weight", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
    yield from _fp8(f"{base}.o_proj.weight", hidden, heads * c["v_head_dim"])


def _ends(c: dict[str, Any]) -> Iterator[Entry]:
    yield from _plain("model.embed_tokens.weight", c["vocab_size"], c["hidden_size"])
    yield from _plain("model.norm.weight", c["hidden_size"])
    yield from _plain("lm_head.weight", c["vocab_size"], c["hidden_size"])


def _moe(c: dict[str, Any]) -> Iterator[Entry]:
    """Experts stored one by one: Qwen3-MoE, GLM-4 MoE, DeepSeek-V3; layers after the last one predict more tokens."""
    yield from _ends(c)
    hidden, latent = c["hidden_size"], "kv_lora_rank" in c
    linear = _fp8 if latent else _plain
    experts = c.get("n_routed_experts") or c["num_experts"]
    for layer in range(c["num_hidden_layers"] + c.get("num_nextn_predict_layers", 0)):
        base = f"model.layers.{layer}"
        yield from _plain(f"{base}.input_layernorm.weight", hidden)
        yield from _plain(f"{base}.post_attention_layernorm.weight", hidden)
        if latent:
            yield from _latent_attention(f"{base}.self_attn", c)
        else:
            yield from _grouped_attention(f"{base}.self_attn", c, True, "qkv" if c.get("attention_bias") else "")
        if layer < c.get("first_k_dense_replace", 0):
            yield from _gated(f"{base}.mlp", hidden, c["intermediate_size"], linear)
            continue
        yield from _plain(f"{base}.mlp.gate.weight", experts, hidden)
        if "n_shared_experts" in c:
            yield from _plain(f"{base}.mlp.gate.e_score_correction_bias", experts, dtype="F32")
            width = c["moe_intermediate_size"] * c["n_shared_experts"]
            yield from _gated(f"{base}.mlp.shared_experts", hidden, width, linear)
        for expert in range(experts):
            yield from _gated(f"{base}.mlp.experts.{expert}", hidden, c["moe_intermediate_size"], linear)
        if layer >= c["num_hidden_layers"]:
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield from _plain(f"{base}.{norm}.weight", hidden)
            yield from _plain(f"{base}.eh_proj.weight", hidden, 2 * hidden)
            if latent:
                yield from _plain(f"{base}.embed_tokens.weight", c["vocab_size"], hidden)
                yield from _plain(f"{base}.shared_head.head.weight", c["vocab_size"], hidden)


def _gpt_oss(c: dict[str, Any]) -> Iterator[Entry]:
    yield from _ends(c)
    hidden, width, experts = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    for layer in range(c["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        yield from _plain(f"{base}.input_layernorm.weight", hidden)
        yield from _plain(f"{base}.post_attention_layernorm.weight", hidden)
        yield from _grouped_attention(f"{base}.self_attn", c, False, "qkvo")
        yield from _plain(f"{base}.self_attn.sinks", c["num_attention_heads"])
        yield from _plain(f"{base}.mlp.router.weight", experts, hidden)
        yield from _plain(f"{base}.mlp.router.bias", experts)
        for name, rows, columns in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
            stem = f"{base}.mlp.experts.{name}_proj"
            yield from _plain(f"{stem}_blocks", experts, rows, columns // 32, 16, dtype="U8")
            yield from _plain(f"{stem}_scales", experts, rows, columns // 32, dtype="U8")
            yield from _plain(f"{stem}_bias", experts, rows)


_MAKERS: dict[str, Callable[[dict[str, Any]], Iterator[Entry]]] = {
    **dict.fromkeys(("qwen3_moe", "glm4_moe", "deepseek_v3", "kimi_k2"), _moe),
    "gpt_oss": _gpt_oss,
}
