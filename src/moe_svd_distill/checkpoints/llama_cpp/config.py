"""From a GGUF file's metadata to the config.json of the model it was made from.

transformers has a table for this too (`GGUF_CONFIG_MAPPING`), which a test holds this one against. It lacks DeepSeek,
and of what it has the widths of heads and experts, sliding windows and every scaling of rotary positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from moe_svd_distill.checkpoints.llama_cpp.header import ANOTHER, Settings
from moe_svd_distill.errors import BadDataError, IncompatiblePairError, shown

_ALWAYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_IF_THERE = {
    "feed_forward_length": "intermediate_size",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


_LOW, _HIGH = 1.0, 4.0
_ORIGINALS = (8192, *(1 << power for power in range(10, 19)))
_SAME = 1e-3


def config_of(settings: Settings, factors: Sequence[float] | None) -> dict[str, object]:
    """The configuration, of the class for text alone where there are two.

    Args:
        settings: From the first file.
        factors: The numbers of ``rope_freqs.weight``, where the file has it.

    Raises:
        IncompatiblePairError: An architecture that is not known here.
        BadDataError: A setting is missing, or says what no field of the configuration can say.
    """
    if settings.architecture not in _ARCHITECTURES:
        raise IncompatiblePairError(
            f"{settings.source} is of llama.cpp's architecture {shown(settings.architecture)} "
            f"(read are {', '.join(_ARCHITECTURES)})",
            ANOTHER,
        )
    embedding = settings.tensors.get("token_embd.weight")
    if embedding is None:
        raise BadDataError(f"{settings.source} has no tensor token_embd.weight: it is no language model", ANOTHER)
    config: dict[str, Any] = {name: settings.need(key) for key, name in _ALWAYS.items()}
    config |= {name: value for key, name in _IF_THERE.items() if (value := settings.find(key)) is not None}
    config["num_hidden_layers"] = settings.layers
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = settings.one_table or "output.weight" not in settings.tensors
    for key, name in _TOKENS.items():
        config[name] = settings.metadata.get(f"tokenizer.ggml.{key}")
    config |= _ARCHITECTURES[settings.architecture](settings)
    rotary = _rotary(settings, config.get("head_dim") or settings.head_dim, factors)
    if config["model_type"] == "gemma3_text":
        near = settings.find("rope.freq_base_swa") or 10_000.0
        config["rope_parameters"] = {
            "full_attention": rotary,
            "sliding_attention": {"rope_type": "default", "rope_theta": near},
        }
    else:
        config["rope_parameters"] = rotary
    return config


def _llama(settings: Settings) -> dict[str, object]:
    """Llama, Mistral and Mixtral, which llama.cpp does not tell apart."""
    if settings.find("expert_count"):
        experts = settings.need("expert_count"), settings.need("expert_used_count")
        return _typed("mixtral", "Mixtral") | dict(
            zip(("num_local_experts", "num_experts_per_tok"), experts, strict=True), sliding_window=None
        )
    names = (settings.metadata.get(f"general.{key}") for key in ("name", "basename"))
    if any("mistral" in str(name).lower() for name in names) and "blk.0.attn_q.bias" not in settings.tensors:
        return _typed("mistral", "Mistral") | {"sliding_window": None}
    biases = {
        "attention_bias": "blk.0.attn_q.bias" in settings.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in settings.tensors,
    }
    return _typed("llama", "Llama") | biases


def _qwen2(settings: Settings) -> dict[str, object]:
    return _typed("qwen2", "Qwen2") | {"use_sliding_window": False}


def _qwen2_moe(settings: Settings) -> dict[str, object]:
    shared = {"shared_expert_intermediate_size": settings.need("expert_shared_feed_forward_length")}
    return _typed("qwen2_moe", "Qwen2Moe") | _experts(settings) | shared | {"norm_topk_prob": False}


def _qwen3(settings: Settings) -> dict[str, object]:
    return _typed("qwen3", "Qwen3") | {"head_dim": settings.head_dim} | {"use_sliding_window": False}


def _qwen3_moe(settings: Settings) -> dict[str, object]:
    own = _experts(settings) | {"head_dim": settings.head_dim}
    return _typed("qwen3_moe", "Qwen3Moe") | own | {"norm_topk_prob": True}  # llama.cpp always norms them


def _gemma3(settings: Settings) -> dict[str, object]:
    # Not in the file; llama.cpp tells the model of 27 billion parameters by its 62 layers.
    width, heads = settings.need("embedding_length"), settings.need("attention.head_count")
    scalar = width // heads if settings.layers == 62 else settings.head_dim
    window, cap = settings.find("attention.sliding_window"), settings.find("final_logit_softcapping")
    layout = {"sliding_window": window} if window else {"layer_types": ["full_attention"] * settings.layers}
    return (
        _typed("gemma3_text", "Gemma3")
        | {"head_dim": settings.head_dim}
        | layout
        | {
            "query_pre_attn_scalar": scalar,
            "final_logit_softcapping": cap,
        }
    )


def _gpt_oss(settings: Settings) -> dict[str, object]:
    return (
        _typed("gpt_oss", "GptOss")
        | {"head_dim": settings.head_dim}
        | {
            "num_local_experts": settings.need("expert_count"),
            "num_experts_per_tok": settings.need("expert_used_count"),
            "intermediate_size": settings.need("expert_feed_forward_length"),
            "sliding_window": settings.need("attention.sliding_window"),
        }
    )


def _deepseek(settings: Settings) -> dict[str, object]:
    """The second and the third version: the latter's routers use the sigmoid."""
    third = settings.find("expert_gating_func") == 2
    rotary = settings.need("rope.dimension_count")
    key = settings.find("attention.key_length_mla") or settings.need("attention.key_length")
    value = settings.find("attention.value_length_mla") or settings.need("attention.value_length")
    groups, used = settings.find("expert_group_count"), settings.find("expert_group_used_count")
    experts = settings.need("expert_count")
    if third and groups is None:  # older files do not say
        groups, used = (8, 4) if experts == 256 else (1, 1)
    own = {
        "num_key_value_heads": settings.need("attention.head_count"),  # the file's number is that of the latent
        "head_dim": rotary,
        "q_lora_rank": settings.find("attention.q_lora_rank"),
        "kv_lora_rank": settings.need("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": value,
        "n_routed_experts": experts,
        "n_shared_experts": settings.find("expert_shared_count") or None,
        "num_experts_per_tok": settings.need("expert_used_count"),
        "moe_intermediate_size": settings.need("expert_feed_forward_length"),
        "first_k_dense_replace": settings.find("leading_dense_block_count") or 0,
        "routed_scaling_factor": settings.find("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(settings.find("expert_weights_norm")),
        "n_group": groups,
        "topk_group": used,
    }
    if third:
        return _typed("deepseek_v3", "DeepseekV3") | own
    return (
        _typed("deepseek_v2", "DeepseekV2")
        | own
        | {"topk_method": "group_limited_greedy" if (groups or 1) > 1 else "greedy"}
    )


_ARCHITECTURES: dict[str, Callable[[Settings], dict[str, object]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "gemma3": _gemma3,
    "deepseek2": _deepseek,
    "gpt-oss": _gpt_oss,
}


def _typed(model_type: str, name: str) -> dict[str, object]:
    return {"model_type": model_type, "architectures": [f"{name}ForCausalLM"]}


def _experts(settings: Settings) -> dict[str, object]:
    found = {name: settings.need(key) for key, name in _EXPERTS.items()}
    found["moe_intermediate_size"] = settings.need("expert_feed_forward_length")
    return found


def _rotary(settings: Settings, dimensions: int, factors: Sequence[float] | None) -> dict[str, object]:
    """Rotary positions, of so many dimensions of a head; factors, if given, are what each frequency is divided by."""
    base = {"rope_theta": settings.find("rope.freq_base") or 10_000.0}
    turned = settings.find("rope.dimension_count")
    if turned is not None and turned != dimensions:
        raise BadDataError(
            f"{settings.source} turns {turned} dimensions of a head with {dimensions}, which is not read here", ANOTHER
        )
    kind = settings.find("rope.scaling.type") or "none"
    if factors is not None and any(abs(factor - 1) > _SAME for factor in factors):
        return base | _by_wavelength(settings, factors, base["rope_theta"])
    if kind == "none":
        return base | {"rope_type": "default"}
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": settings.need("rope.scaling.factor")}
    if kind != "yarn":
        raise BadDataError(
            f"{settings.source} scales rotary positions by {shown(kind)} (read are linear, yarn and Llama 3's)",
            ANOTHER,
        )
    return base | _yarn(settings)


def _yarn(settings: Settings) -> dict[str, object]:
    found = {
        "rope_type": "yarn",
        "factor": settings.need("rope.scaling.factor"),
        "original_max_position_embeddings": settings.need("rope.scaling.original_context_length"),
    }
    optional = {
        "attention_factor": "rope.scaling.yarn_attn_factor",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    found |= {name: value for name, key in optional.items() if (value := settings.find(key)) is not None}
    if (multiplier := settings.find("rope.scaling.yarn_log_multiplier")) is not None:
        # Of DeepSeek, a tenth of mscale_all_dim; mscale is not in the file, and the same in every model so far.
        found |= dict.fromkeys(("mscale", "mscale_all_dim"), round(multiplier * 10, 6))
    return found | ({"truncate": False} if settings.architecture == "gpt-oss" else {})


def _by_wavelength(settings: Settings, factors: Sequence[float], theta: float) -> dict[str, object]:
    """Llama 3's scaling, told by the factors that it makes; which context it was for shows in them."""
    factor = max(factors)
    lengths = [2 * math.pi * theta ** (place / len(factors)) for place in range(len(factors))]
    for original in _ORIGINALS:
        made = [_divisor(length, factor, original) for length in lengths]
        if all(math.isclose(found, wanted, rel_tol=_SAME) for found, wanted in zip(made, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    raise BadDataError(f"{settings.source} scales rotary positions otherwise than Llama 3 does (rope_freqs)", ANOTHER)


def _divisor(length: float, factor: float, original: int) -> float:
    """What the frequency of a wavelength is divided by."""
    if length < original / _HIGH:
        return 1.0
    if length > original / _LOW:
        return factor
    smooth = (original / length - _LOW) / (_HIGH - _LOW)
    return 1 / ((1 - smooth) / factor + smooth)
