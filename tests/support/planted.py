"""Students made from their teacher by permuting experts, neurons and attention heads, plus a little noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moe_svd_distill.roles import ModelLayout, TensorView

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

    def matrix(self, view: TensorView | None) -> torch.Tensor:
        """A matrix or vector inside the tensors; writing to it writes to them."""
        assert view is not None
        return matrix_in(self.tensors[view.stored], view)


def matrix_in(stored: torch.Tensor, view: TensorView) -> torch.Tensor:
    """The matrix or vector of a view inside its stored tensor."""
    return view.within(stored if view.expert is None else stored[view.expert])


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
        if layout.find("attention.v", layer):
            _permute_heads(layout, layer, planted, generator)
        for prefix in ("dense", "shared"):
            if layout.find(f"{prefix}.gate", layer):
                _permute_neurons(layout, prefix, layer, None, planted, generator)
        if layout.experts_at(layer):
            _permute_experts(layout, layer, planted, generator)
            for expert in range(layout.experts_at(layer)):
                _permute_neurons(layout, "experts", layer, expert, planted, generator)
    for meaning in layout.meanings.values():
        if meaning.is_matrix and meaning.role != "embedding":
            matrix = planted.matrix(meaning.view)
            error = torch.randn(matrix.shape, generator=generator) * noise * matrix.float().std()
            matrix.copy_((matrix.float() + error).to(matrix.dtype))
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
    gate, up, down = (planted.matrix(layout.view(f"{prefix}.{side}", layer, expert)) for side in ("gate", "up", "down"))
    order = _order(gate.shape[0], generator)
    for matrix, dimension in ((gate, 0), (up, 0), (down, 1)):
        matrix.copy_(matrix.index_select(dimension, order))
    planted.neurons[prefix, layer, expert] = order.tolist()


def _permute_heads(layout: ModelLayout, layer: int, planted: Planted, generator: torch.Generator) -> None:
    size, groups = layout.geometry.head_dimension, layout.geometry.key_value_heads
    each = layout.geometry.query_heads // groups
    kv = _order(groups, generator)
    query = torch.cat([group * each + _order(each, generator) for group in kv.tolist()])
    for role, order, dim in (("q", query, 0), ("k", kv, 0), ("v", kv, 0), ("o", query, 1)):
        rows = (order[:, None] * size + torch.arange(size)).flatten()
        matrix = planted.matrix(layout.view(f"attention.{role}", layer))
        matrix.copy_(matrix.index_select(dim, rows))
        if role != "o" and layout.find(f"attention.{role}.bias", layer):
            bias = planted.matrix(layout.view(f"attention.{role}.bias", layer))
            bias.copy_(bias[rows])
    planted.heads[layer] = query.tolist()


def _permute_experts(layout: ModelLayout, layer: int, planted: Planted, generator: torch.Generator) -> None:
    order = _order(layout.experts_at(layer), generator)
    for role in ("router", "router.bias", "router.correction_bias"):
        if layout.find(role, layer):
            vector = planted.matrix(layout.view(role, layer))
            vector.copy_(vector[order])
    for side in ("gate", "up", "down"):
        matrices = [planted.matrix(layout.view(f"experts.{side}", layer, expert)) for expert in range(len(order))]
        moved = [matrices[source].clone() for source in order.tolist()]
        for matrix, content in zip(matrices, moved, strict=True):
            matrix.copy_(content)
    planted.experts[layer] = order.tolist()
