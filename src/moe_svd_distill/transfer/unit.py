"""Does one unit of work: reads what it needs of both models and returns LoRA pairs and the record of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from moe_svd_distill.families import Family, Geometry
from moe_svd_distill.pairing.unit import TensorTask, UnitOfWork
from moe_svd_distill.transfer.attention import transfer_attention
from moe_svd_distill.transfer.context import UnitContext
from moe_svd_distill.transfer.ends import transfer_ends
from moe_svd_distill.transfer.energy import cut_to_energy
from moe_svd_distill.transfer.experts import transfer_experts
from moe_svd_distill.transfer.mlp import transfer_mlp
from moe_svd_distill.transfer.outcome import TensorOutcome, UnitResult, kept
from moe_svd_distill.transfer.reader import NonFiniteTensorError, TensorReader
from moe_svd_distill.transfer.residual import residual_map
from moe_svd_distill.transfer.settings import TransferSettings
from moe_svd_distill.transfer.shaping import Shaper

if TYPE_CHECKING:
    from moe_svd_distill.checkpoints import Checkpoint

Group = Callable[[tuple[TensorTask, ...], UnitContext], list[TensorOutcome]]


def transfer_unit(
    unit: UnitOfWork,
    teacher: Checkpoint,
    student: Checkpoint,
    geometries: tuple[Geometry, Geometry],
    family: Family,
    settings: TransferSettings,
    device: str,
    report: Callable[[float], None] = lambda fraction: None,
) -> UnitResult:
    """Do one unit of work.

    Args:
        unit: What to do.
        teacher: The teacher.
        student: The student.
        geometries: Sizes of teacher and student.
        family: The student's family.
        settings: The recipe's numbers.
        device: Where to compute.
        report: Told the share of the unit that is done, 0 to 1.

    Raises:
        BadDataError: NaN or Inf in a weight, where the recipe says to fail.
    """
    reader = TensorReader(teacher, student, device, nan=settings.nan, interpolation=settings.interpolation)
    mapped = residual_map(teacher, student, device) if settings.projection == "procrustes" else None
    shaper = Shaper(settings.projection, mapped)
    context = UnitContext(unit, reader, shaper, settings, *geometries, family, report=report)
    outcomes: list[TensorOutcome] = []
    for roles, transfer in _groups():
        tasks = tuple(task for task in unit.tasks if task.role in roles or task.role.startswith(roles))
        outcomes += _transfer_or_skip(transfer, tasks, context)
    done = {outcome.name for outcome in outcomes}
    outcomes += [kept(task, task.reason) for task in unit.tasks if task.name not in done]
    outcomes = cut_to_energy(outcomes, settings.energy)
    return _result(outcomes, context)


def _groups() -> tuple[tuple[tuple[str, ...], Group], ...]:
    return (
        (("attention.q", "attention.k", "attention.v", "attention.o"), transfer_attention),
        (("dense.",), lambda tasks, context: transfer_mlp("dense", tasks, context)),
        (("shared.",), lambda tasks, context: transfer_mlp("shared", tasks, context)),
        (("experts.", "router"), transfer_experts),
        (("embedding", "head"), transfer_ends),
    )


def _transfer_or_skip(transfer: Group, tasks: tuple[TensorTask, ...], context: UnitContext) -> list[TensorOutcome]:
    if not tasks:
        return []
    try:
        return transfer(tasks, context)
    except NonFiniteTensorError as error:
        return [kept(task, task.reason or f"skipped: {error}") for task in tasks]


def _result(outcomes: list[TensorOutcome], context: UnitContext) -> UnitResult:
    dtype = getattr(torch, context.settings.dtype)
    tensors = {}
    for outcome in outcomes:
        if outcome.left is not None and outcome.right is not None:
            tensors[f"{outcome.name}#A"] = outcome.right.to(dtype).cpu().contiguous()
            tensors[f"{outcome.name}#B"] = outcome.left.to(dtype).cpu().contiguous()
    unit = context.unit
    record: dict[str, Any] = {
        "label": unit.label,
        "layer": unit.layer,
        "teacher_layers": [list(pair) for pair in unit.teacher_layers],
        "tensors": sorted((outcome.record for outcome in outcomes), key=lambda record: str(record["name"])),
        **context.facts,
    }
    if context.reader.replaced:
        record["replaced_by_zero"] = dict(context.reader.replaced)
    return UnitResult(tensors, record)
