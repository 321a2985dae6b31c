"""Does one unit of work: reads what it needs of both models and returns LoRA pairs and the record of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch

from moe_svd_distill.pairing.unit import TensorTask, UnitOfWork
from moe_svd_distill.roles import Geometry
from moe_svd_distill.transfer.context import UnitContext, residual_map
from moe_svd_distill.transfer.factors import TensorOutcome, cut_to_energy, kept
from moe_svd_distill.transfer.facts import UnitFacts
from moe_svd_distill.transfer.reader import NonFiniteTensorError, TensorReader
from moe_svd_distill.transfer.settings import TransferSettings
from moe_svd_distill.transfer.tensor_groups import (
    transfer_alone,
    transfer_attention,
    transfer_embedding_and_head,
    transfer_experts,
    transfer_mlp,
)

if TYPE_CHECKING:
    from moe_svd_distill.checkpoints import Checkpoint

Group = Callable[[tuple[TensorTask, ...], UnitContext], list[TensorOutcome]]
Produced: TypeAlias = tuple[dict[str, torch.Tensor], UnitFacts]


def transfer_unit(
    unit: UnitOfWork,
    models: tuple[Checkpoint, Checkpoint],
    geometries: tuple[Geometry, Geometry],
    settings: TransferSettings,
    device: str,
    report: Callable[[float], None] = lambda fraction: None,
) -> Produced:
    """Do one unit of work.

    Args:
        unit: What to do.
        models: Teacher and student.
        geometries: Their sizes.
        settings: The recipe's numbers.
        device: Where to compute.
        report: Told the share of the unit that is done, 0 to 1.

    Returns:
        ``<view name>#A`` (rank, columns) and ``<view name>#B`` (rows, rank) to tensor, for assembly to join the parts
        of a matrix and to give them their final keys; and ``{"label", "tensors": [...], ...}`` of plain JSON types.

    Raises:
        BadDataError: NaN or Inf in a weight, where the recipe says to fail.
    """
    teacher, student = models
    reader = TensorReader(teacher, student, device, nan=settings.nan, interpolation=settings.interpolation)
    mapped = residual_map(teacher, student, unit.embeddings, device) if settings.projection == "procrustes" else None
    context = UnitContext(unit, reader, settings, *geometries, mapped, report=report)
    outcomes: list[TensorOutcome] = []
    for group, transfer in GROUPS.items():
        outcomes += _transfer_or_skip(transfer, tuple(t for t in unit.tasks if _group(t) == group), context)
    outcomes = cut_to_energy(outcomes, settings.energy)
    return _result(outcomes, context)


GROUPS: dict[str, Group] = {
    "attention": transfer_attention,
    "dense": lambda tasks, context: transfer_mlp("dense", tasks, context),
    "shared": lambda tasks, context: transfer_mlp("shared", tasks, context),
    "experts": transfer_experts,
    "embedding and head": transfer_embedding_and_head,
    "alone": transfer_alone,
}
_GROUP_OF = {
    **dict.fromkeys(("attention.q", "attention.k", "attention.v", "attention.o"), "attention"),
    **{f"{prefix}.{side}": prefix for prefix in ("dense", "shared", "experts") for side in ("gate", "up", "down")},
    "router": "experts",
    "embedding": "embedding and head",
    "head": "embedding and head",
}


def _group(task: TensorTask) -> str:
    return _GROUP_OF.get(task.role, "alone")


def _transfer_or_skip(transfer: Group, tasks: tuple[TensorTask, ...], context: UnitContext) -> list[TensorOutcome]:
    if not tasks:
        return []
    try:
        return transfer(tasks, context)
    except NonFiniteTensorError as error:
        return [kept(task, task.reason or f"skipped: {error}") for task in tasks]


def _result(outcomes: list[TensorOutcome], context: UnitContext) -> Produced:
    dtype = getattr(torch, context.settings.dtype)
    tensors = {}
    for outcome in outcomes:
        if outcome.pair is not None:
            (left, right), name = outcome.pair, outcome.record["name"]
            tensors[f"{name}#A"] = right.to(dtype).cpu().contiguous()
            tensors[f"{name}#B"] = left.to(dtype).cpu().contiguous()
    unit = context.unit
    record: UnitFacts = {
        "label": unit.label,
        "layer": unit.layer,
        "teacher_layers": [list(pair) for pair in unit.teacher_layers],
        "tensors": sorted((outcome.record for outcome in outcomes), key=lambda record: str(record["name"])),
        **context.facts,
    }
    if context.reader.replaced:
        record["replaced_by_zero"] = dict(context.reader.replaced)
    return tensors, record
