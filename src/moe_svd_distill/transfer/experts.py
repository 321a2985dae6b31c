"""The experts of a mixture-of-experts layer and their router.

Every student expert becomes the blend of the teacher experts of its cluster, brought to its shape; its router row
becomes the blend of their router rows, so that tokens go on reaching what they used to reach in the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from moe_svd_distill.pairing.unit import TensorTask
from moe_svd_distill.transfer.context import UnitContext, folded
from moe_svd_distill.transfer.factors import Delta, factorise, factorise_group, make_delta
from moe_svd_distill.transfer.grouping import Grouping, group_experts
from moe_svd_distill.transfer.mlp import gated_deltas
from moe_svd_distill.transfer.outcome import TensorOutcome, kept

if TYPE_CHECKING:
    from torch import Tensor

ROLES = ("experts.gate", "experts.up", "experts.down")
EXPERTS_AT_ONCE = 4  # experts whose deltas are held in float32 together


def transfer_experts(tasks: tuple[TensorTask, ...], context: UnitContext) -> list[TensorOutcome]:
    """LoRA pairs of all routed experts of a layer and of its router."""
    routed = sorted((t for t in tasks if t.role in ROLES), key=lambda t: (t.expert or 0, ROLES.index(t.role)))
    router = next((task for task in tasks if task.role == "router"), None)
    if router is None or not router.change or not routed or not routed[0].change:
        group = routed + ([router] if router else [])
        return [kept(task, task.reason) for task in group]
    experts = [routed[start : start + 3] for start in range(0, len(routed), 3)]
    grouping = group_experts(experts, router, context)
    context.facts["experts"] = grouping.facts
    outcomes = [_transfer_router(router, grouping, context)]
    for first in range(0, len(experts), EXPERTS_AT_ONCE):
        deltas = [
            list(_expert_deltas(experts[index], grouping.members[index], context))
            for index in range(first, min(len(experts), first + EXPERTS_AT_ONCE))
        ]
        for kind in range(3):
            outcomes += factorise_group([group[kind] for group in deltas], context.settings)
        context.report(min(1.0, (first + EXPERTS_AT_ONCE) / len(experts)))
    return outcomes


def _expert_deltas(
    tasks: Sequence[TensorTask], members: tuple[tuple[int, float], ...], context: UnitContext
) -> Iterator[Delta]:
    synthetic = [_blend(kind, members, context) for kind in range(3)]
    facts: list[dict[str, Any]] = [{"teacher_experts": [list(member) for member in members]} for _ in range(3)]
    yield from gated_deltas(list(tasks), (synthetic[0], synthetic[1], synthetic[2]), facts, context)


def _blend(kind: int, members: tuple[tuple[int, float], ...], context: UnitContext) -> Tensor:
    """The blend of a cluster's experts, each interpolated between the two adjacent teacher layers; float32."""
    layers = context.unit.teacher_experts
    total: Tensor | None = None
    for expert, weight in members:
        matrix = context.reader.teacher(layers[0].tensors[expert][kind])
        if len(layers) == 2:
            upper = context.reader.teacher(layers[1].tensors[expert][kind])
            matrix = context.reader.interpolate(matrix, upper, layers[1].weight)
        total = matrix * weight if total is None else total.add_(matrix, alpha=weight)
    assert total is not None, "a cluster has at least one member"
    return total


def _transfer_router(task: TensorTask, grouping: Grouping, context: UnitContext) -> TensorOutcome:
    layers = context.unit.teacher_experts
    rows = context.reader.teacher(layers[0].router)
    if len(layers) == 2:
        rows = context.reader.interpolate(rows, context.reader.teacher(layers[1].router), layers[1].weight)
    blended = torch.stack([sum(rows[expert] * weight for expert, weight in group) for group in grouping.members])  # type: ignore[misc]
    target, how = context.bring(task, blended)
    facts = {"sources": [[layer.router.name, layer.weight] for layer in layers], **how}
    target, facts = folded(target, context.gain_ratio(task), facts)
    return factorise(
        make_delta(task, target, context.reader.student(task.view), facts, context.settings), context.settings
    )
