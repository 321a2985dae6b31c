"""The shapes of the lab's models, as ordinary transformers configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig

from lab.plan import VOCABULARY

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

_MOE: dict[str, Any] = {
    **_COMMON,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.0,
}


def configuration(architecture: str) -> PretrainedConfig:
    """Return the configuration called `architecture`."""
    match architecture:
        case "qwen3-moe-large":
            return Qwen3MoeConfig(
                **_MOE,
                hidden_size=192,
                intermediate_size=384,
                num_hidden_layers=5,
                num_attention_heads=6,
                num_key_value_heads=2,
                num_experts=16,
                num_experts_per_tok=4,
                moe_intermediate_size=96,
            )
        case "qwen3-moe-small":
            return Qwen3MoeConfig(
                **_MOE,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_experts=8,
                num_experts_per_tok=2,
                moe_intermediate_size=64,
            )
        case "llama-large":
            return LlamaConfig(
                **_COMMON,
                hidden_size=192,
                intermediate_size=384,
                num_hidden_layers=5,
                num_attention_heads=6,
                num_key_value_heads=2,
            )
        case "llama-small":
            return LlamaConfig(
                **_COMMON,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
    raise KeyError(f"no architecture called {architecture!r}")


def fresh_model(architecture: str, seed: int) -> PreTrainedModel:
    """Return a float32 model with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    config = configuration(architecture)
    options = {"experts_implementation": "grouped_mm"} if isinstance(config, Qwen3MoeConfig) else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=torch.float32, **options
    )
    return model
