"""Tiny students of every family, built by transformers, and random adapters for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.naming import lora_keys
from moe_svd_distill.families import Carrier, Family
from moe_svd_distill.families.registry import families

LAYERS = 3
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True},
    "qwen3": {"model_type": "qwen3"},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        "model_type": "glm4_moe",
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "use_qk_norm": True,
        "attention_bias": True,
        "n_group": 1,
        "topk_group": 1,
    },
}


def save_student(folder: Path, name: str, *, shard: str = "50GB", **changes: Any) -> Path:
    """A student with random bf16 weights of useful size, in the layout transformers saves."""
    torch.manual_seed(0)
    fields = COMMON | MODELS[name] | changes
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def family_of(folder: Path) -> Family:
    return families()[config_of(folder)["model_type"]]


def hub_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a student, by hub name."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def carried(folder: Path, *, embedding: bool = False) -> list[str]:
    """Hub names of every tensor that an adapter can carry, the embeddings only if asked for."""
    wanted = {Carrier.MODULE, Carrier.PARAMETER, Carrier.FUSED_EXPERT} | ({Carrier.EMBEDDING} if embedding else set())
    roles = [role for role in family_of(folder).roles if role.carrier in wanted]
    return sorted(name for name in hub_weights(folder) if any(role.pattern.match(name) for role in roles))


def default_rank(hub_name: str) -> int:
    return 8 if hub_name == "lm_head.weight" else 4


def random_pairs(
    student: Path,
    names: list[str] | None = None,
    *,
    rank: Callable[[str], int] = default_rank,
    dtype: torch.dtype = torch.bfloat16,
    size: float = 0.1,
) -> dict[str, torch.Tensor]:
    """A random pair for every named tensor of a student: key to factor."""
    generator = torch.Generator().manual_seed(1)
    weights = hub_weights(student)
    pairs = {}
    for name in names if names is not None else carried(student):
        rows, columns = weights[name].shape
        if "embed_tokens" in name:
            rows, columns = columns, rows
        key_a, key_b = lora_keys(name)
        pairs[key_a] = (torch.randn(rank(name), columns, generator=generator) * size).to(dtype)
        pairs[key_b] = (torch.randn(rows, rank(name), generator=generator) * size).to(dtype)
    return pairs


def save_adapter(
    folder: Path, student: Path, pairs: Mapping[str, torch.Tensor], configuration: dict[str, Any] | None = None
) -> Path:
    """Write an adapter as the project writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(pairs), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if configuration is None:
        configuration = configure(student, pairs)
    (folder / "adapter_config.json").write_text(json.dumps(configuration))
    return folder


def configure(student: Path, pairs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    shapes = {key: tuple(value.shape) for key, value in pairs.items()}
    tied = bool(config_of(student).get("tie_word_embeddings"))
    return build_configuration(
        shapes, family_of(student), base_model=str(student), student_layers=LAYERS, tied_embeddings=tied
    )


def own_head(student: Path) -> torch.Tensor:
    """The weight that the student's head multiplies by, in fp32."""
    weights = hub_weights(student)
    return weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).float()


def with_whole_head(
    student: Path, pairs: Mapping[str, torch.Tensor], *, size: float = 0.1, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The pairs with the head's taken out and a head saved whole put in, which differs by random numbers."""
    base = own_head(student)
    head = base + size * torch.randn(base.shape, generator=torch.Generator().manual_seed(3))
    kept = {key: value for key, value in pairs.items() if "lm_head" not in key}
    return kept | {"base_model.model.lm_head.weight": head.to(dtype)}


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


@cache
def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(tokens()).logits
    return output


def truth(student: Path, pairs: Mapping[str, torch.Tensor], scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Hub name to ``W + scale·B·A``, or the head saved whole, in fp32: from the definition, by no code under test."""
    weights = {name: weight.float() for name, weight in hub_weights(student).items()}
    if "base_model.model.lm_head.weight" in pairs:
        weights["lm_head.weight"] = pairs["base_model.model.lm_head.weight"].float()
    for name in weights:
        module = name.removesuffix(".weight")
        if f"base_model.model.{module}.lora_A.weight" in pairs:
            a, b = (pairs[f"base_model.model.{module}.lora_{side}.weight"].float() for side in "AB")
            weights[name] = weights[name] + scale * b @ a
        elif f"base_model.model.{module}.lora_embedding_A" in pairs:
            a, b = (pairs[f"base_model.model.{module}.lora_embedding_{side}"].float() for side in "AB")
            weights[name] = weights[name] + scale * (b @ a).T
    return weights
