"""Model folders written as GGUF files by the rules of llama.cpp's converter (its `conversion/` at 2026-11).

The names are those of the package `gguf`, and the order of operations is the converter's: what the product reads is
made by nothing of the product.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "mixtral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen2_moe": "QWEN2MOE",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
    "gemma3_text": "GEMMA3",
    "deepseek_v2": "DEEPSEEK2",
    "deepseek_v3": "DEEPSEEK2",
    "gpt_oss": "GPT_OSS",
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
NORMAL, CONTROL, UNUSED = 1, 3, 5


def write_gguf(
    model: Path,
    file: Path,
    kind: str = "F32",
    *,
    split: int = 0,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Convert a model.

    Args:
        model: Its folder, with a tokenizer.json.
        file: Where to.
        kind: Type of the matrices, as far as their rows are whole blocks; else F16.
        split: Tensors of one file, 0 for all.
        change: What is done to the writer before it writes.

    Returns:
        The file, or the first of them.
    """
    config = json.loads((model / "config.json").read_text())
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config["model_type"]]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture], split_max_tensors=split)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(config["model_type"])
    _settings(writer, config)
    _tokens(writer, model, config["vocab_size"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for hub, tensor in _tensors(model, config):
        name = names.get_name(hub, try_suffixes=(".weight", ".bias"))
        assert name is not None, hub
        _add(writer, name, tensor, kind)
    if _rope(config).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file if not split else next(iter(sorted(file.parent.glob(f"{file.stem}-00001-of-*.gguf"))))


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> None:
    data = tensor.float().numpy()
    wanted = gguf.GGMLQuantizationType[kind]
    plain = data.ndim <= 1 or name.endswith("_norm.weight") or ".ffn_gate_inp" in name or not name.endswith(".weight")
    if plain:
        wanted = gguf.GGMLQuantizationType.F32
    try:
        stored = gguf.quants.quantize(data, wanted)
    except gguf.QuantError:
        wanted = gguf.GGMLQuantizationType.F16
        stored = gguf.quants.quantize(data, wanted)
    writer.add_tensor(name, stored, raw_dtype=wanted)


def _settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    kind, rope = config["model_type"], _rope(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    latent = kind.startswith("deepseek")
    writer.add_head_count_kv(1 if latent else config["num_key_value_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])
    if near := (config.get("rope_parameters") or {}).get("sliding_attention"):
        writer.add_rope_freq_base_swa(near["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(key):
            writer.add_expert_count(config[key])
            break
    if config.get("num_experts_per_tok"):
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("head_dim") and not latent:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if kind in ("llama", "mistral", "mixtral"):
        writer.add_vocab_size(config["vocab_size"])
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        writer.add_rope_dimension_count(head)
    if kind in ("qwen2_moe", "qwen3_moe"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if kind == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if kind == "gpt_oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if kind in ("gpt_oss", "gemma3_text"):
        writer.add_sliding_window(config["sliding_window"])
    if latent:
        _latent_settings(writer, config, rope)


def _latent_settings(writer: gguf.GGUFWriter, config: dict[str, Any], rope: dict[str, Any]) -> None:
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + turned)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + turned)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(True)
    if config.get("n_group"):
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    third = config["model_type"] == "deepseek_v3"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if third else gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_rope_dimension_count(turned)
    if rope.get("mscale_all_dim") is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("rope_parameters") or {}
    whole: dict[str, Any] = found.get("full_attention", found)
    return {"rope_theta": config.get("rope_theta", 10000.0), **whole}


def _tokens(writer: gguf.GGUFWriter, model: Path, rows: int) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    names = {number: token for token, number in content["model"]["vocab"].items()}
    special = {token["id"] for token in content["added_tokens"] if token["special"]}
    names |= {token["id"]: token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(place, f"[PAD{place}]") for place in range(rows)])
    kinds = [CONTROL if place in special else NORMAL if place in names else UNUSED for place in range(rows)]
    writer.add_token_types(kinds)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_token_merges(merges)
    end = next(place for place, token in names.items() if token == settings["eos_token"])
    writer.add_eos_token_id(end)
    if settings.get("chat_template"):
        writer.add_chat_template(settings["chat_template"])


def _tensors(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Hub name, as the converter hands it to its table, and values as it writes them."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        weights |= load_file(file)
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if match := _EXPERT.fullmatch(name):
            stacked = f"{match[1]}.{match[3]}.weight".replace("block_sparse_moe", "feed_forward").removeprefix("model.")
            known = stacked if config["model_type"] == "mixtral" else f"{match[1]}.{match[3]}.weight"
            experts.setdefault(known, {})[int(match[2])] = tensor
            continue
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        yield from _changed(name, tensor, config)
    for name, tensors in experts.items():
        yield name, torch.stack([tensors[number] for number in sorted(tensors)])


def _changed(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    kind = config["model_type"]
    if kind in ("llama", "mistral", "mixtral") and re.search(r"\.(q|k)_proj\.(weight|bias)$", name):
        heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
        shape = tensor.shape
        tensor = tensor.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    elif kind == "gemma3_text" and name.endswith("norm.weight"):
        tensor = tensor.float() + 1
    elif name.endswith("kv_b_proj.weight"):
        keys, values = config["qk_nope_head_dim"], config["v_head_dim"]
        both = tensor.view(config["num_attention_heads"], keys + values, tensor.shape[-1])
        k_b, v_b = both.split([keys, values], dim=1)
        yield name.replace("kv_b_proj", "k_b_proj"), k_b.transpose(1, 2).contiguous()
        yield name.replace("kv_b_proj", "v_b_proj"), v_b.contiguous()
        return
    elif name.endswith("e_score_correction_bias"):
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    elif kind == "gpt_oss" and "experts" in name:
        yield from _gpt_oss(name, tensor)
        return
    elif name.endswith("sinks"):
        name += ".weight"
    yield name, tensor


def _gpt_oss(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if name.endswith("down_proj_bias"):
        yield name.replace("down_proj_bias", "down_proj.bias"), tensor
    elif name.endswith("gate_up_proj_bias"):
        yield name.replace("gate_up_proj_bias", "gate_proj.bias"), tensor[..., ::2].contiguous()
        yield name.replace("gate_up_proj_bias", "up_proj.bias"), tensor[..., 1::2].contiguous()
    elif name.endswith("down_proj"):
        yield f"{name}.weight", tensor.mT.contiguous()
    else:
        turned = tensor.mT
        yield name.replace("gate_up_proj", "gate_proj.weight"), turned[:, ::2].contiguous()
        yield name.replace("gate_up_proj", "up_proj.weight"), turned[:, 1::2].contiguous()


def _llama3_factors(config: dict[str, Any]) -> np.ndarray[Any, Any]:
    rope = _rope(config)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factors = []
    for place in range(0, size, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (place / size)
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if length < high:
            factors.append(1.0)
        elif length > low:
            factors.append(rope["factor"])
        else:
            span = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / span
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)
