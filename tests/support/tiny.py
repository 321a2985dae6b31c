"""Tiny students of several makes, built by transformers, and random adapters for them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.keys import AdapterKeys, Factors, planned_tensors
from moe_svd_distill.adapter.naming import PREFIX, parse_key
from moe_svd_distill.adapter.peft_model import modules_of
from moe_svd_distill.adapter.settling import settle_keys
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import open_checkpoint

LAYERS, EXPERTS = 3, 4
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
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {  # the experts of a layer in one tensor, (experts, in, out)
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
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


@cache
def keys_of(student: Path) -> AdapterKeys:
    """What an adapter of a student can change; a folder never holds two students in turn."""
    return settle_keys(Architecture(open_checkpoint(student)))


def architecture_of(student: Path) -> Architecture:
    return keys_of(student).architecture


def hub_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a student, by stored name."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def carried(student: Path, *, embedding: bool = False) -> list[str]:
    """Every matrix that an adapter can carry, the embeddings only if asked for; of a tied student no end at all."""
    keys = keys_of(student)
    ends = () if keys.architecture.tied else (keys.architecture.head, keys.architecture.embedding)[: 1 + embedding]
    return sorted([*keys.matrices(), *ends])


def default_rank(name: str) -> int:
    return 8 if name == "lm_head.weight" else 4


class GivenPairs:
    """Pairs at hand, as `planned_tensors` takes them: name of a matrix to ``(B, A)``."""

    def __init__(self, given: Mapping[str, Factors]) -> None:
        self._given = given
        self.dtype = next(iter(given.values()))[0].dtype

    def rank(self, name: str) -> int:
        return self._given[name][1].shape[0]

    def factors(self, name: str) -> Factors:
        return self._given[name]


def random_pairs(
    student: Path,
    names: list[str] | None = None,
    *,
    rank: Callable[[str], int] = default_rank,
    dtype: torch.dtype = torch.bfloat16,
    size: float = 0.1,
) -> dict[str, torch.Tensor]:
    """A random pair for every named matrix of a student, as an adapter holds it: key to factor."""
    generator = torch.Generator().manual_seed(1)
    keys = keys_of(student)
    names = names or carried(student)
    matrices, slots = keys.matrices(), keys.architecture.skeleton.slots
    targets = keys.changed_by(names)
    ends = {target.names[0]: slots[target.parameter].shape for target in targets if not target.matrices}
    factors = {}
    for name in names:
        rows, columns = ends[name] if name in ends else matrices[name].shape
        left, right = (torch.randn(shape, generator=generator) for shape in ((rows, rank(name)), (rank(name), columns)))
        factors[name] = (left * size).to(dtype), (right * size).to(dtype)
    modules = {}
    if not all(target.own_keys for target in targets):
        ranks = {target.parameter: target.rank(rank) for target in targets}
        modules = modules_of(keys.architecture, build_configuration(keys, ranks, base_model=""))
    planned = planned_tensors(keys, targets, modules, GivenPairs(factors))
    return {key: plan.make().contiguous() for key, plan in planned.items()}


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


def configure(student: Path, pairs: Mapping[str, torch.Tensor], **options: Any) -> dict[str, Any]:
    """The configuration of an adapter's tensors, by the ranks that they have."""
    keys = keys_of(student)
    shape_of = {module: value.shape for key, value in pairs.items() for module, side in [parse_key(key)] if side == "A"}
    ranks = {}
    for parameter, target in keys.targets.items():
        if target.own_keys:
            stems = {name: name.removesuffix(".weight") for name in target.names}
            if stems[target.names[0]] in shape_of:
                ranks[parameter] = target.rank(lambda name, stems=stems: shape_of[stems[name]][0])  # type: ignore[misc]
            continue
        for module, (rows, columns) in shape_of.items():
            if module.replace(".base_layer", "") == target.module and columns == target.matrices[0].shape[1]:
                ranks[parameter] = rows // target.matrices[0].experts
    whole = any(parse_key(key)[1] == "whole" for key in pairs)
    return build_configuration(keys, ranks, base_model=str(student), whole_head=whole, **options)


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


def with_adapter(student: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The student with an adapter around it, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_model(student, dtype), str(adapter)).eval()


@cache
def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(tokens()).logits
    return output


def truth(student: Path, pairs: Mapping[str, torch.Tensor], scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Stored name to ``W + scale·B·A``, or the head saved whole, in fp32: from the definition, by no tested code."""
    weights = {name: weight.float() for name, weight in hub_weights(student).items()}
    if "base_model.model.lm_head.weight" in pairs:
        weights["lm_head.weight"] = pairs["base_model.model.lm_head.weight"].float()
    for key in pairs:
        if ".lora_embedding_A" in key:
            module = key.removeprefix(PREFIX).removesuffix(".lora_embedding_A")
            a, b = pairs[key].float(), pairs[key.replace("_A", "_B")].float()
            weights[f"{module}.weight"] += scale * (b @ a).T
        elif ".lora_A" in key:
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a, b = pairs[key].float(), pairs[key.replace("lora_A", "lora_B")].float()
            if f"{module}.weight" in weights:
                weights[f"{module}.weight"] += scale * b @ a
            else:  # PEFT's pair of all experts, which gpt_oss stores as (experts, in, out)
                size = len(a) // EXPERTS
                change = torch.einsum("ore,eri->eio", b.view(-1, size, EXPERTS), a.view(EXPERTS, size, -1))
                inside = module.replace(".base_layer", "")
                (name,) = (n for n in weights if n.startswith(inside) and weights[n].shape == change.shape)
                weights[name] += scale * change
    return weights
