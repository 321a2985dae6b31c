"""Embeddings and head, in blocks of vocabulary rows: they can be larger than all the rest of a unit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moe_svd_distill.algebra.low_rank_of_blocks import low_rank_of_blocks
from moe_svd_distill.algebra.sparsity import keep_largest
from moe_svd_distill.pairing.unit import TensorTask
from moe_svd_distill.transfer.context import UnitContext, source_facts
from moe_svd_distill.transfer.outcome import TensorOutcome, changed, kept

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ENTRIES = 1 << 24  # 64 MiB in float32


def transfer_ends(tasks: tuple[TensorTask, ...], context: UnitContext) -> list[TensorOutcome]:
    """LoRA pairs of the embeddings and the head."""
    ends = [task for task in tasks if task.role in ("embedding", "head")]
    return [_transfer(task, context) if task.change else kept(task, task.reason) for task in ends]


def _transfer(task: TensorTask, context: UnitContext) -> TensorOutcome:
    ratio = context.gain_ratio(task)
    rows, columns = task.shape
    step = max(1, BLOCK_ENTRIES // columns)
    facts: dict[str, Any] = source_facts(task)
    student_square = 0.0

    def block(start: int) -> Tensor:
        nonlocal student_square, facts
        stop = min(rows, start + step)
        source = context.reader.teacher_rows(task.sources[0].view, start, stop)
        block_task = replace(task, shape=(stop - start, columns))
        target, how = context.bring(block_task, source)
        facts |= how
        own = context.reader.student_rows(task.view, start, stop)
        student_square += float(own.double().square().sum())
        delta = (target if ratio is None else target * ratio) - own
        if context.settings.delta_sparsity < 1.0:
            return keep_largest(delta, context.settings.delta_sparsity, rescale=True)
        return delta

    factors = low_rank_of_blocks(lambda: (block(start) for start in range(0, rows, step)), rows, columns, task.rank)
    student_norm = (student_square / factors.passes) ** 0.5
    facts |= {
        "delta_norm": factors.norm,
        "relative_delta": factors.norm / student_norm if student_norm else float(factors.norm > 0),
        "residual": factors.residual,
        "energy": 1.0 - factors.residual**2,
        "factorisation": "gram of blocks",
    }
    if ratio is not None:
        facts["norm"] = "folded"
    left, right = factors.left, factors.right
    if task.role == "embedding":
        # PEFT keeps the pair of embeddings transposed: A (rank, vocabulary), B (hidden, rank).
        return changed_embedding(task, left, right, facts)
    return changed(task, left, right, facts)


def changed_embedding(task: TensorTask, left: Tensor, right: Tensor, facts: dict[str, Any]) -> TensorOutcome:
    """The transposed pair of the embeddings."""
    outcome = changed(task, left, right, facts)
    return TensorOutcome(outcome.name, torch.clone(right.mT), torch.clone(left.mT), outcome.record)
