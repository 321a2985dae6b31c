"""Students made from their teacher by permuting experts, neurons and attention heads, plus a little noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moe_svd_distill.families import ModelLayout

Tensors = dict[str, torch.Tensor]


@dataclass
class Planted:
    """The student's tensors and what was done to them.

    Attributes:
        tensors: Hub name to tensor.
        neurons: Place of a gated MLP, (prefix, layer, student expert), to the teacher neuron of each student neuron.
        heads: Layer to the teacher query head of each student query head.
        experts: Layer to the teacher expert of each student expert.
    """

    tensors: Tensors
    neurons: dict[tuple[str, int, int | None], list[int]] = field(default_factory=dict)
    heads: dict[int, list[int]] = field(default_factory=dict)
    experts: dict[int, list[int]] = field(default_factory=dict)


def plant(layout: ModelLayout, teacher: Mapping[str, torch.Tensor], *, noise: float, seed: int = 0) -> Planted:
    """Permute everything that can be permuted without changing the function, then add noise to the linear weights.

    Args:
        layout: The teacher's layout.
        teacher: Hub name to tensor.
        noise: Standard deviation of the noise, relative to each tensor's own.
        seed: Seed of permutations and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    planted = Planted({name: tensor.clone() for name, tensor in teacher.items()})
    for layer in range(layout.geometry.layers):
        _permute_heads(layout, layer, planted, generator)
        for prefix in ("dense", "shared"):
            if layout.find(f"{prefix}.gate", layer):
                _permute_neurons(layout, prefix, layer, None, planted, generator)
        if layout.experts_at(layer):
            _permute_experts(layout, layer, planted, generator)
            for expert in range(layout.experts_at(layer)):
                _permute_neurons(layout, "experts", layer, expert, planted, generator)
    for name, meaning in layout.meanings.items():
        if len(meaning.role.axes) == 2 and meaning.role.role != "embedding":
            tensor = planted.tensors[name]
            error = torch.randn(tensor.shape, generator=generator) * noise * tensor.float().std()
            planted.tensors[name] = (tensor.float() + error).to(tensor.dtype)
    return planted


def _order(count: int, generator: torch.Generator) -> torch.Tensor:
    """A permutation that moves something."""
    while True:
        order = torch.randperm(count, generator=generator)
        if count == 1 or order.tolist() != list(range(count)):
            return order


def _permute_neurons(
    layout: ModelLayout, prefix: str, layer: int, expert: int | None, planted: Planted, generator: torch.Generator
) -> None:
    names = [layout.find(f"{prefix}.{side}", layer, expert) for side in ("gate", "up", "down")]
    gate, up, down = (str(name) for name in names)
    order = _order(planted.tensors[gate].shape[0], generator)
    planted.tensors[gate] = planted.tensors[gate][order]
    planted.tensors[up] = planted.tensors[up][order]
    planted.tensors[down] = planted.tensors[down][:, order]
    planted.neurons[prefix, layer, expert] = order.tolist()


def _permute_heads(layout: ModelLayout, layer: int, planted: Planted, generator: torch.Generator) -> None:
    size, groups = layout.geometry.head_dimension, layout.geometry.key_value_heads
    each = layout.geometry.query_heads // groups
    kv = _order(groups, generator)
    query = torch.cat([group * each + _order(each, generator) for group in kv.tolist()])
    for role, order, dim in (("q", query, 0), ("k", kv, 0), ("v", kv, 0), ("o", query, 1)):
        rows = (order[:, None] * size + torch.arange(size)).flatten()
        name = str(layout.find(f"attention.{role}", layer))
        planted.tensors[name] = planted.tensors[name].index_select(dim, rows)
        if role != "o" and (bias := layout.find(f"attention.{role}.bias", layer)):
            planted.tensors[bias] = planted.tensors[bias][rows]
    planted.heads[layer] = query.tolist()


def _permute_experts(layout: ModelLayout, layer: int, planted: Planted, generator: torch.Generator) -> None:
    order = _order(layout.experts_at(layer), generator)
    for role in ("router", "router.correction_bias"):
        if name := layout.find(role, layer):
            planted.tensors[name] = planted.tensors[name][order]
    for side in ("gate", "up", "down"):
        names = [str(layout.find(f"experts.{side}", layer, expert)) for expert in range(len(order))]
        moved = [planted.tensors[names[source]] for source in order.tolist()]
        planted.tensors.update(zip(names, moved, strict=True))
    planted.experts[layer] = order.tolist()
