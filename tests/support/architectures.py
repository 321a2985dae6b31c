"""A tiny model of every model type, made by shrinking the defaults of its own configuration class.

Where an architecture shares something between layers (keys and values, top-k indices, inputs for each layer), the tiny
model does too. A name such as ``gemma4_text#moe`` is a second form of the type before the sign.
"""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

LAYERS = 4
VOCABULARY = 96
EXPERTS = 4

_NAMES = """
llama mistral ministral3 mistral3 qwen2 qwen3 qwen3_5 qwen3_5_text gemma2 gemma3 gemma3_text gemma3n_text gemma4
gemma4_text gemma4_unified phi phi3 glm glm4 olmo2 olmo3 olmo_hybrid cohere2 smollm3 seed_oss ernie4_5 exaone4
hunyuan_v1_dense granite nemotron starcoder2 falcon_h1 lfm2 lfm3 apertus arcee nanochat stablelm minicpm3 youtu
helium bitnet gpt2 gpt_neox qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text qwen4_exp_text qwen3_vl
qwen3_vl_moe mixtral olmoe flex_olmo deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 kimi_k25 kimi_linear glm4_moe
glm4_moe_lite glm_moe_dsa glm5_next glm4v_moe dots1 ernie4_5_moe hunyuan_v1_moe hy_v3 hy_v4 minimax minimax_m2
minimax_m3_vl phimoe granitemoe granitemoeshared granitemoehybrid granitemoe_swa gpt_oss llama4 llama4_text
longcat_flash bailing_hybrid mistral4 mistral_large4 step3p7 mimo_v2_flash nemotron_h lfm2_moe afmoe solar_open
exaone_moe cohere2_moe jamba bamba axk1 axk2 laguna mellum inkling_text inkling2_text zaya zamba2 jetmoe aria_text
kolibri1 flint beam gemma4_text#moe qwen3_moe#mixed
"""
MODEL_TYPES: tuple[str, ...] = tuple(_NAMES.split())

QUICK: tuple[str, ...] = (
    "llama",
    "qwen3_moe",  # experts stored one by one
    "mixtral",  # the same under names that transformers renames
    "glm4_moe",  # dense first layer, shared expert, correction bias
    "gpt_oss",  # experts stored (E, in, out), interleaved, with biases
    "granitemoe",  # experts stored (E, out, in); multipliers
    "llama4",  # a wrapper; experts (E, in, out); layers by turns
    "gemma3n_text",  # several residual streams, inputs for each layer, shared keys and values, a cap
    "gemma4_text#moe",
    "deepseek_v4",  # routing by token id, several residual streams
    "glm_moe_dsa",  # top-k indices shared between layers
    "nemotron_h",  # Mamba, attention, experts without a gate
    "mistral3",  # a wrapper without a causal class
    "qwen3_5_moe",  # a wrapper; linear attention
    "kimi_k25",
    "zamba2",  # a block shared by several layers
)


def every_type() -> list[Any]:
    """Values for ``pytest.mark.parametrize``: all types, of which only `QUICK` run without ``-m all_types``."""
    marks = {name: [pytest.mark.all_types] + [pytest.mark.soak] * (name not in QUICK) for name in MODEL_TYPES}
    return [pytest.param(name, marks=marks[name]) for name in (*QUICK, *(n for n in MODEL_TYPES if n not in QUICK))]


# What a tiny model has, of whatever its configuration knows.
_COUNTS = {
    1: "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace moe_layer_start_index "
    "first_dense num_dense_layers n_group topk_group num_expert_group mamba_n_groups n_groups bos_token_id",
    2: "num_key_value_heads linear_num_key_heads index_n_heads num_experts_per_tok moe_k moe_topk top_k top_k_experts "
    "zero_expert_num mamba_expand o_groups index_kpool index_topk_blocks eos_token_id",
    4: "num_attention_heads linear_num_value_heads linear_num_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts mamba_d_state mamba_n_heads mamba_num_heads ssm_state_size mamba_dt_rank mamba_d_conv "
    "linear_conv_kernel_dim rotary_dim qk_rope_head_dim laurel_rank index_topk index_block_size num_hidden_layers",
    6: "sliding_window attention_chunk_size o_lora_rank",
    8: "head_dim linear_key_head_dim linear_value_head_dim linear_head_dim qk_nope_head_dim v_head_dim kv_lora_rank "
    "index_head_dim mamba_chunk_size chunk_size query_pre_attn_scalar hidden_size_per_layer_input",
    12: "q_lora_rank qk_head_dim",
    16: "moe_hidden_size expert_ffn_hidden_size share_expert_dim shared_expert_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size mamba_d_head mamba_head_dim",
    24: "moe_intermediate_size",
    32: "hidden_size",
    48: "intermediate_size ffn_hidden_size dense_intermediate_size",
    64: "mamba_d_ssm",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings",
    0: "pad_token_id num_nextn_predict_layers",
}
_SIZES: dict[str, Any] = {name: count for count, names in _COUNTS.items() for name in names.split()}
_SIZES |= {"tie_word_embeddings": False, "use_mamba_kernels": False, "attn_implementation": "eager"}

_SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2}
_INDEXERS = {"indexer_types": ["full", "shared"] * 2}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN4 = {"hc_count": 2, "hc_lowrank": 4, "ple_layer_ids": [1], "ple_embed_dim": 16, "split_ngram_parts": 1}
_QWEN4 |= {"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 4, "ngram_size": 3, "heads_per_ngram": 2}
_QWEN4 |= {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4}
_NO_EXPERTS = dict.fromkeys(("num_experts", "moe_intermediate_size", "top_k_experts"))

# What a type needs besides; also of the configurations inside wrappers.
_OF_TYPE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "jamba": {f"{kind}_layer_{field}": n for kind in ("attn", "expert") for field, n in (("period", 2), ("offset", 1))},
    "longcat_flash": {"num_layers": LAYERS},
    "lfm2_moe": _CONVOLUTION,
    "lfm2": {**_CONVOLUTION, "block_auto_adjust_ff_dim": False},
    "gemma3n_text": _SLIDING
    | {
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * LAYERS,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {**_SLIDING, **_NO_EXPERTS, "num_kv_shared_layers": 2},
    "gemma4_text#moe": _SLIDING
    | {"num_kv_shared_layers": 0, "enable_moe_block": True, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text": _SLIDING,
    "zamba2": {"tie_word_embeddings": True},  # its layers share a block only then
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {**_LINEAR, **_QWEN4, "indexer_compress_ratio": 2},
    "qwen3_moe#mixed": {"mlp_only_layers": [0]},
    "kimi_linear": _LINEAR,
    "glm5_next_text": {**_LINEAR, "num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "mistral4": {
        "rope_parameters": _ROPE
        | {"partial_rotary_factor": 0.334, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
    },
    "mistral_large4_text": {**_INDEXERS, "no_rope_layers": [1, 1, 0, 0], "kv_source_layers": [0, 0, 2, 2]},
    "glm_moe_dsa": _INDEXERS,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "llama4_text": {"moe_layers": [1, 3], "intermediate_size_mlp": 48, "no_rope_layers": [1, 1, 1, 0]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "moe"]},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A tiny configuration.

    Args:
        model_type: One of `MODEL_TYPES`, or another one of transformers with a decoder of usual names.
        changes: Fields to override; of a wrapper, those of its text part (and its own where it has them too).
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type.split("#")[0]], model_type, changes)


def model_class(config: Any) -> Any:
    """The class that checkpoints of a configuration are stored as."""
    from transformers.models.auto import modeling_auto as auto

    order = [auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    order = [*(order[::-1] if hasattr(config, "text_config") else order), auto.MODEL_FOR_MULTIMODAL_LM_MAPPING]
    found = next(mapping[type(config)] for mapping in order if type(config) in mapping)
    return found[0] if isinstance(found, tuple) else found


def build(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model with random weights large enough that every part of it matters.

    Args:
        model_type: See `tiny_config`.
        seed: Seed of the weights.
        dtype: Type of the weights.
        changes: See `tiny_config`.
    """
    config = tiny_config(model_type, **changes)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(config)._from_config(config, dtype=dtype)
    _randomise(model, torch.Generator().manual_seed(seed + 1))
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    """Save a model the hub's way, in several shards; returns the folder."""
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def saved(model_type: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Build and save a tiny model; returns the folder."""
    return save(build(model_type, seed, dtype, **changes), folder)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model in memory, in the class that its config.json names."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def tokens(sequences: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids (sequences, length), special ones left out."""
    return torch.randint(3, VOCABULARY - 6, (sequences, length), generator=torch.Generator().manual_seed(seed))


def _shrunk(kind: Any, model_type: str, changes: dict[str, Any]) -> Any:
    """A configuration of a class with the fields it has made small."""
    full = kind()
    fields = full.to_dict()
    known = {*fields, *inspect.signature(kind.__init__).parameters, *(getattr(kind, "attribute_map", None) or {})}
    inner = getattr(kind, "sub_configs", None) or {}
    own = _OF_TYPE.get(model_type, {})
    small = {name: value for name, value in _SIZES.items() if name in known} | own
    if "kv_lora_rank" in known:  # latent attention: all heads have keys of their own
        small["num_key_value_heads"] = 4
        if "head_dim" in small and "head_dim" not in own:
            small["head_dim"] = 4
    small |= {name: value for name, value in changes.items() if name in known} if inner else changes
    if "vocab_size_per_layer_input" in known and "vocab_size" in changes:
        small["vocab_size_per_layer_input"] = changes["vocab_size"]
    layers = changes.get("num_hidden_layers", LAYERS)
    small |= {name: _repeated(value, layers) for name, value in own.items() if name not in changes}
    if "mrope_section" in (fields.get("rope_parameters") or ()):
        small.setdefault("rope_parameters", _with_rope_sections(fields["rope_parameters"], small.get("head_dim", 8)))
    for name, value in fields.items():  # a kind for each layer: every kind in turn
        if name not in small and isinstance(value, list) and 4 <= len(value) == getattr(full, "num_hidden_layers", 0):
            kinds = list({str(entry): entry for entry in value}.values())
            small[name] = [kinds[index % len(kinds)] for index in range(layers)]
    for name in inner:
        if name not in small and (part := getattr(full, name, None)) is not None:
            is_text = "text" in name or name == "llm_config"
            small[name] = _shrunk(type(part), part.model_type, changes) if is_text else _shrunk_tower(part, changes)
    return kind(**small)


def _repeated(value: Any, layers: int) -> Any:
    """A list with an entry for each layer, for another number of layers."""
    per_layer = isinstance(value, list) and len(value) == LAYERS
    return [value[index % LAYERS] for index in range(layers)] if per_layer else value


def _with_rope_sections(parameters: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary parameters whose sections add up to half a head."""
    half = int(head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2 or 1
    count = len(parameters["mrope_section"])
    return {**parameters, "mrope_section": [half // count + (index < half % count) for index in range(count)]}


def _shrunk_tower(part: Any, changes: dict[str, Any]) -> Any:
    """A small configuration of an encoder for pictures or sound."""
    fields = part.to_dict()
    small = {
        **dict.fromkeys(("hidden_size", "embed_dim", "d_model"), 32),
        **dict.fromkeys(("out_hidden_size", "output_dim", "projection_dim"), changes.get("hidden_size", 32)),
        **dict.fromkeys(("projector_hidden_size",), changes.get("hidden_size", 32)),
        **dict.fromkeys(("intermediate_size", "mlp_dim"), 48),
        **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), 2),
        **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "num_key_value_heads"), 4),
        "head_dim": 8,
    }
    small = {name: value for name, value in small.items() if name in fields}
    for name in ("model_type", "transformers_version", "architectures"):
        fields.pop(name, None)
    try:
        return type(part)(**{**fields, **small})
    except Exception:  # some classes do not take what they give
        return type(part)(**small)


@torch.no_grad()
def _randomise(model: Any, generator: torch.Generator, scale: float = 3.0) -> None:
    """Make the usual initial weights matter: with those the logits would be almost constant."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "norm" in name:
            parameter.nan_to_num_().add_(0.2 * torch.rand(parameter.shape, generator=generator))
        elif not bool(parameter.isfinite().all()) or float(parameter.std()) == 0:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        else:
            parameter.mul_(scale)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # experts by token id
            buffer.copy_(torch.randint(0, EXPERTS, buffer.shape, generator=generator))
        elif any(part in name for part in ("e_score", "expert_bias", "correction")):
            buffer.add_((torch.rand(buffer.shape, generator=generator) * 0.1).to(buffer.dtype))
