"""Cropping a trained Qwen3-MoE model to a smaller shape: what is most used stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Crop:
    """Which rows and columns of the larger model remain."""

    hidden: torch.Tensor
    layers: tuple[int, ...]
    queries: torch.Tensor
    keys: torch.Tensor


def _largest(score: torch.Tensor, count: int) -> torch.Tensor:
    return score.topk(count).indices.sort().values


def _spread(larger: int, smaller: int) -> tuple[int, ...]:
    """Choose `smaller` of `larger` layers, evenly, with the first and the last."""
    if smaller == 1:
        return (0,)
    return tuple(round(index * (larger - 1) / (smaller - 1)) for index in range(smaller))


def _head_rows(config: PretrainedConfig, smaller: PretrainedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the first heads of every key-value group, so that each query keeps its key."""
    width = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    kept = smaller.num_attention_heads // smaller.num_key_value_heads
    keys = list(range(smaller.num_key_value_heads))
    queries = [key * group + index for key in keys for index in range(kept)]

    def rows(heads: list[int]) -> torch.Tensor:
        return torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])

    return rows(queries), rows(keys)


def _plan(weights: Weights, config: PretrainedConfig, smaller: PretrainedConfig) -> Crop:
    embedded, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    gain = weights["model.norm.weight"]
    importance = embedded.pow(2).mean(0) / embedded.pow(2).mean() + (head * gain).pow(2).mean(0) / head.pow(2).mean()
    queries, keys = _head_rows(config, smaller)
    layers = _spread(config.num_hidden_layers, smaller.num_hidden_layers)
    return Crop(_largest(importance, smaller.hidden_size), layers, queries, keys)


def _crop_experts(
    weights: Weights, source: str, target: str, hidden: torch.Tensor, config: PretrainedConfig
) -> Weights:
    """Keep the experts with the largest router rows, and of each the strongest neurons."""
    router = weights[f"{source}.gate.weight"]  # (E, H)
    joined = weights[f"{source}.experts.gate_up_proj"]  # (E, 2I, H)
    down = weights[f"{source}.experts.down_proj"]  # (E, H, I)
    size = config.moe_intermediate_size
    experts = _largest(router.norm(dim=1), config.num_experts)
    gates, ups = joined.chunk(2, dim=1)
    new_joined, new_down = [], []
    for expert in experts.tolist():
        strength = gates[expert].norm(dim=1) * ups[expert].norm(dim=1) * down[expert].norm(dim=0)
        neurons = _largest(strength, size)
        new_joined.append(torch.cat([gates[expert][neurons][:, hidden], ups[expert][neurons][:, hidden]]))
        new_down.append(down[expert][hidden][:, neurons])
    return {
        f"{target}.gate.weight": router[experts][:, hidden],
        f"{target}.experts.gate_up_proj": torch.stack(new_joined),
        f"{target}.experts.down_proj": torch.stack(new_down),
    }


def crop_into(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Fill `student` with the parts of `teacher` that are kept; every tensor of the student is replaced."""
    weights: Weights = {name: value.detach().float() for name, value in teacher.state_dict().items()}
    config = student.config
    crop = _plan(weights, teacher.config, config)
    hidden = crop.hidden
    new: Weights = {
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:, hidden],
        "model.norm.weight": weights["model.norm.weight"][hidden],
        "lm_head.weight": weights["lm_head.weight"][:, hidden],
    }
    for index, layer in enumerate(crop.layers):
        source, target = f"model.layers.{layer}", f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            new[f"{target}.{norm}.weight"] = weights[f"{source}.{norm}.weight"][hidden]
        for norm in ("q_norm", "k_norm"):
            new[f"{target}.self_attn.{norm}.weight"] = weights[f"{source}.self_attn.{norm}.weight"]
        for role, rows in (("q_proj", crop.queries), ("k_proj", crop.keys), ("v_proj", crop.keys)):
            name = f"self_attn.{role}.weight"
            new[f"{target}.{name}"] = weights[f"{source}.{name}"][rows][:, hidden]
        name = "self_attn.o_proj.weight"
        new[f"{target}.{name}"] = weights[f"{source}.{name}"][hidden][:, crop.queries]
        new.update(_crop_experts(weights, f"{source}.mlp", f"{target}.mlp", hidden, config))
    student.load_state_dict(new, strict=True)
