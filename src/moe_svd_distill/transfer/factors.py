"""From a target matrix to the LoRA pair of its difference to the student."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_svd_distill.algebra.dtypes import matmul_dtype
from moe_svd_distill.algebra.low_rank import LowRank, batched_truncated_svd, truncated_svd
from moe_svd_distill.algebra.sparsity import keep_largest
from moe_svd_distill.transfer.outcome import TensorOutcome, changed

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.pairing.unit import TensorTask
    from moe_svd_distill.transfer.settings import TransferSettings


@dataclass(frozen=True)
class Delta:
    """What is to be added to one student tensor.

    Attributes:
        task: The tensor.
        matrix: Target minus student, (rows, columns), float32.
        student_norm: Frobenius norm of the student's tensor.
        facts: How the target came about, for the record.
    """

    task: TensorTask
    matrix: Tensor
    student_norm: float
    facts: dict[str, Any]


def make_delta(
    task: TensorTask, target: Tensor, student: Tensor, facts: dict[str, Any], settings: TransferSettings
) -> Delta:
    """Difference of target and student, thinned out where the recipe asks for it."""
    matrix = target - student
    if settings.delta_sparsity < 1.0:
        matrix = keep_largest(matrix, settings.delta_sparsity, rescale=True)
        facts = {**facts, "kept_entries": settings.delta_sparsity}
    return Delta(task, matrix, float(torch.linalg.vector_norm(student)), facts)


def factorise(delta: Delta, settings: TransferSettings, *, rank: int | None = None) -> TensorOutcome:
    """The LoRA pair of one delta.

    Args:
        delta: The difference.
        settings: Gives the seed and the share of energy to keep.
        rank: Rank of the pair; default: the task's.
    """
    rank = delta.task.rank if rank is None else rank
    factors = truncated_svd(
        delta.matrix,
        rank,
        generator=generator_for(delta.task.name, settings.seed),
        pass_dtype=matmul_dtype(delta.matrix.device),
    )
    return _outcome(delta, factors)


def factorise_group(deltas: Sequence[Delta], settings: TransferSettings) -> list[TensorOutcome]:
    """LoRA pairs of same-shaped deltas (the experts of a layer), which go through batched kernels together."""
    first = deltas[0]
    generator = generator_for(first.task.name, settings.seed)
    stack = torch.stack([delta.matrix for delta in deltas])
    results = batched_truncated_svd(stack, first.task.rank, generator=generator, pass_dtype=matmul_dtype(stack.device))
    return [_outcome(delta, factors) for delta, factors in zip(deltas, results, strict=True)]


def generator_for(name: str, seed: int) -> torch.Generator:
    """A generator that depends on the tensor and the recipe's seed alone, not on which worker runs or when."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _outcome(delta: Delta, factors: LowRank) -> TensorOutcome:
    norm = float(torch.linalg.vector_norm(delta.matrix))
    facts = {
        **delta.facts,
        "delta_norm": norm,
        "relative_delta": norm / delta.student_norm if delta.student_norm else float(norm > 0),
        "residual": factors.residual,
        "energy": factors.energy,
        "factorisation": factors.method,
    }
    return changed(delta.task, factors.left, factors.right, facts)
