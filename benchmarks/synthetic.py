"""Synthetic Qwen3-MoE checkpoints of any size, written layer by layer so that no more than a layer is in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SPECTRUM = 0.25  # share of the smaller dimension that carries the power-law part
NOISE = 0.02


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Qwen3-MoE model, as in config.json."""

    layers: int
    hidden: int
    experts: int
    expert_neurons: int
    query_heads: int
    key_value_heads: int
    head_dimension: int
    vocabulary: int
    experts_per_token: int = 4

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "moe_intermediate_size": self.expert_neurons,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dimension,
            "num_experts": self.experts,
            "num_experts_per_tok": min(self.experts_per_token, self.experts),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "dtype": "bfloat16",
        }


# The pair of the end-to-end comparison: 1.15 GB together.
TEACHER = Sizes(8, 1024, 32, 512, 16, 4, 64, 8192)
STUDENT = Sizes(6, 768, 24, 384, 12, 4, 64, 8192)


def write_model(folder: Path, sizes: Sizes, seed: int, device: str = "cpu") -> Path:
    """Write a model, one shard for each layer and one for the ends.

    Args:
        folder: Where to.
        sizes: How large.
        seed: Seed of the weights.
        device: Where they are drawn; other devices draw other numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(seed)
    shards = sizes.layers + 1
    index: dict[str, str] = {}
    total = 0
    for number in range(shards):
        tensors = _ends(sizes, generator) if number == 0 else _layer(sizes, number - 1, generator)
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(sizes.config(), indent=2))
    return folder


def bulk(rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A matrix like a weight: Gaussian noise plus a power-law part of low rank."""
    rank = max(1, int(SPECTRUM * min(rows, columns)))
    device = generator.device
    decay = torch.arange(1, rank + 1, device=device) ** -0.5
    left = torch.randn(rows, rank, generator=generator, device=device) * decay
    right = torch.randn(rank, columns, generator=generator, device=device)
    return (torch.randn(rows, columns, generator=generator, device=device) * NOISE + NOISE * 0.3 * (left @ right)).to(
        dtype
    )


def _ends(sizes: Sizes, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": bulk(sizes.vocabulary, sizes.hidden, generator),
        "lm_head.weight": bulk(sizes.vocabulary, sizes.hidden, generator),
        "model.norm.weight": _gain(sizes.hidden, generator),
    }


def _layer(sizes: Sizes, layer: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    base = f"model.layers.{layer}."
    queries = sizes.query_heads * sizes.head_dimension
    values = sizes.key_value_heads * sizes.head_dimension
    tensors = {
        f"{base}input_layernorm.weight": _gain(sizes.hidden, generator),
        f"{base}post_attention_layernorm.weight": _gain(sizes.hidden, generator),
        f"{base}self_attn.q_norm.weight": _gain(sizes.head_dimension, generator),
        f"{base}self_attn.k_norm.weight": _gain(sizes.head_dimension, generator),
        f"{base}self_attn.q_proj.weight": bulk(queries, sizes.hidden, generator),
        f"{base}self_attn.k_proj.weight": bulk(values, sizes.hidden, generator),
        f"{base}self_attn.v_proj.weight": bulk(values, sizes.hidden, generator),
        f"{base}self_attn.o_proj.weight": bulk(sizes.hidden, queries, generator),
        f"{base}mlp.gate.weight": bulk(sizes.experts, sizes.hidden, generator),
    }
    for expert in range(sizes.experts):
        name = f"{base}mlp.experts.{expert}."
        tensors[f"{name}gate_proj.weight"] = bulk(sizes.expert_neurons, sizes.hidden, generator)
        tensors[f"{name}up_proj.weight"] = bulk(sizes.expert_neurons, sizes.hidden, generator)
        tensors[f"{name}down_proj.weight"] = bulk(sizes.hidden, sizes.expert_neurons, generator)
    return tensors


def _gain(size: int, generator: torch.Generator) -> torch.Tensor:
    return (1.0 + 0.1 * torch.randn(size, generator=generator, device=generator.device)).to(torch.bfloat16)
