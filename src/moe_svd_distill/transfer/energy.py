"""Ranks by energy: the least rank that keeps a share of every delta, uniform where adapters need it uniform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moe_svd_distill.algebra.low_rank import rank_for_energy
from moe_svd_distill.transfer.outcome import TensorOutcome

if TYPE_CHECKING:
    from torch import Tensor


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
        if outcome.left is not None and outcome.right is not None:
            group = _group(outcome)
            needed[group] = max(needed.get(group, 1), _needed(outcome.left, outcome.right, outcome.record, energy))
    return [_cut(outcome, needed.get(_group(outcome), 1)) for outcome in outcomes]


def _group(outcome: TensorOutcome) -> str:
    role = str(outcome.record["role"])
    return "experts" if role.startswith("experts.") else role


def _needed(left: Tensor, right: Tensor, record: dict[str, object], energy: float) -> int:
    """A rank whose leading factors keep the share; the whole rank where the factors are not singular vectors."""
    if record.get("factorisation") == "exact":
        return left.shape[1]
    sigma = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=1)
    norm = float(str(record["delta_norm"]))
    return rank_for_energy(sigma, energy, norm**2)


def _cut(outcome: TensorOutcome, rank: int) -> TensorOutcome:
    if outcome.left is None or outcome.right is None:
        return outcome
    left, right = outcome.left[:, :rank], outcome.right[:rank]
    sigma = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=1)
    norm = float(outcome.record.get("delta_norm", 0.0))
    kept = float(sigma.double().square().sum())
    facts: dict[str, float] = {"rank": rank}
    if norm and outcome.record.get("factorisation") != "exact":
        share = min(1.0, kept / norm**2)
        facts |= {"energy": share, "residual": (1.0 - share) ** 0.5}
    return TensorOutcome(outcome.name, left, right, {**outcome.record, **facts})
