"""Tiny real models of every family, written the way the hub has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def configuration(model_type: str, **changes: Any) -> Any:
    """A tiny configuration of a family.

    Args:
        model_type: As in config.json.
        changes: Fields to override.
    """
    from transformers import Glm4MoeConfig, LlamaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

    makers: dict[str, Callable[..., Any]] = {
        "llama": LlamaConfig,
        "qwen3": Qwen3Config,
        "qwen3_moe": Qwen3MoeConfig,
        "mixtral": MixtralConfig,
        "glm4_moe": Glm4MoeConfig,
    }
    extra: dict[str, dict[str, Any]] = {
        "llama": {},
        "qwen3": {},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "glm4_moe": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    }
    return makers[model_type](**{**SIZES, **extra[model_type], **changes})


def build(model_type: str, seed: int = 0, *, scale: float = 4.0, **changes: Any) -> Any:
    """A tiny model with random weights large enough that every part of it matters.

    Args:
        model_type: As in config.json.
        seed: Seed of the weights.
        scale: Factor on the usual initial weights, which would leave the logits almost constant.
        changes: Configuration fields to override.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(configuration(model_type, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
            elif "norm" in name:
                parameter.mul_(1.0 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return model.eval()


def save(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """Save a model the hub's way; returns the folder."""
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def saved(model_type: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Build and save a tiny model; returns the folder."""
    return save(build(model_type, seed, **changes), folder, dtype)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model for a forward pass."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def tokens(vocabulary: int = 96, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids, (2, length)."""
    return torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a model on fixed tokens, float32."""
    with torch.no_grad():
        return model(input_ids=tokens(model.config.vocab_size) if ids is None else ids).logits.float()
