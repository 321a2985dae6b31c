"""What a unit of work produces: the LoRA pair of a target's difference to the student, and the record of what was done.

Ranks can be cut by energy: to the least that keeps a share of every delta, uniform where adapters need it uniform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_svd_distill.algebra.dtypes import matmul_dtype
from moe_svd_distill.algebra.low_rank import LowRank, batched_truncated_svd, rank_for_energy, truncated_svd
from moe_svd_distill.transfer.facts import TensorFacts

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.pairing.unit import TensorTask
    from moe_svd_distill.transfer.settings import TransferSettings


@dataclass(frozen=True)
class TensorOutcome:
    """The fate of one student tensor.

    Attributes:
        pair: LoRA B, (rows, rank), and A, (rank, columns); None where nothing is changed.
        record: Facts for the run's record; plain JSON types.
    """

    pair: tuple[Tensor, Tensor] | None
    record: TensorFacts


def kept(task: TensorTask, reason: str) -> TensorOutcome:
    """The outcome of a tensor that stays as it is."""
    return TensorOutcome(None, {**_identity(task), "fate": "kept", "reason": reason})


def changed(task: TensorTask, factors: LowRank, norm: float, student_norm: float, facts: TensorFacts) -> TensorOutcome:
    """The outcome of a tensor with a delta.

    Args:
        task: The tensor.
        factors: Of its delta.
        norm: Frobenius norm of the delta.
        student_norm: The same of the student's tensor.
        facts: How the delta came about, for the record.
    """
    record: TensorFacts = {
        **_identity(task),
        "fate": "lora",
        "rank": factors.left.shape[1],
        **facts,
        "delta_norm": norm,
        "relative_delta": norm / student_norm if student_norm else float(norm > 0),
        "residual": factors.residual,
        "energy": factors.energy,
        "factorisation": factors.method,
    }
    return TensorOutcome((factors.left, factors.right), record)


def _identity(task: TensorTask) -> TensorFacts:
    identity: TensorFacts = {"name": task.name, "role": task.role, "shape": list(task.shape)}
    if task.expert is not None:
        identity["expert"] = task.expert
    return identity


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
    facts: TensorFacts


def factorise(delta: Delta, settings: TransferSettings) -> TensorOutcome:
    """The LoRA pair of one delta."""
    factors = truncated_svd(
        delta.matrix,
        delta.task.rank,
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
    return changed(delta.task, factors, norm, delta.student_norm, delta.facts)


def cut_to_energy(outcomes: Sequence[TensorOutcome], energy: float | None) -> list[TensorOutcome]:
    """Cut every pair to the rank its energy asks for.

    All experts of a layer, and their three projections, keep one rank: fused experts and servers need it.

    Args:
        outcomes: The unit's outcomes; factors are balanced and sorted by singular value.
        energy: Share of each delta's squared norm to keep, or None to leave the ranks alone.
    """
    if energy is None:
        return list(outcomes)
    needed: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.pair is not None:
            group = _group(outcome)
            needed[group] = max(needed.get(group, 1), _needed(*outcome.pair, outcome.record, energy))
    return [_cut(outcome, needed.get(_group(outcome), 1)) for outcome in outcomes]


def _group(outcome: TensorOutcome) -> str:
    role = outcome.record["role"]
    return "experts" if role.startswith("experts.") else role


def _needed(left: Tensor, right: Tensor, record: TensorFacts, energy: float) -> int:
    """A rank whose leading factors keep the share; the whole rank where the factors are not singular vectors."""
    if record.get("factorisation") == "exact":
        return left.shape[1]
    return rank_for_energy(_singular_values(left, right), energy, record["delta_norm"] ** 2)


def _cut(outcome: TensorOutcome, rank: int) -> TensorOutcome:
    if outcome.pair is None:
        return outcome
    left, right = outcome.pair[0][:, :rank], outcome.pair[1][:rank]
    norm = outcome.record.get("delta_norm", 0.0)
    kept = float(_singular_values(left, right).double().square().sum())
    facts: TensorFacts = {"rank": rank}
    if norm and outcome.record.get("factorisation") != "exact":
        share = min(1.0, kept / norm**2)
        facts |= {"energy": share, "residual": (1.0 - share) ** 0.5}
    return TensorOutcome((left, right), {**outcome.record, **facts})


def _singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Of a balanced pair, (rank,)."""
    return torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=1)
