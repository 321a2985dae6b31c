"""Small head problems with a known answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.logits import LogitTransform
from moe_svd_distill.streaming import Head
from moe_svd_distill.training.measuring import StatePairs


@dataclass(frozen=True, eq=False)
class Problem:
    """A student's and a teacher's head, and states to fit and to check on."""

    fit: StatePairs
    check: StatePairs
    student: Head
    teacher: Head


def state_pairs(student: Tensor, teacher: Tensor) -> StatePairs:
    """States of both models, each behind some unused places."""
    padded = torch.cat([torch.full((3, student.shape[1]), 1e3), student])
    moved = torch.cat([torch.full((5, teacher.shape[1]), -1e3), teacher])
    return StatePairs(padded, moved, np.arange(len(student)) + 3, np.arange(len(student)) + 5)


def all_states(pairs: StatePairs) -> tuple[Tensor, Tensor]:
    """Of student and teacher."""
    ((student, teacher),) = pairs.in_order(len(pairs), torch.device("cpu"))
    return student, teacher


def second_moment(pairs: StatePairs) -> Tensor:
    """Of the student's states, (d, d)."""
    student, _ = all_states(pairs)
    return student.T @ student / len(student)


def reachable(
    *,
    fit: int = 4096,
    check: int = 512,
    tokens: int = 30,
    width: int = 12,
    bias: bool = False,
    transform: LogitTransform | None = None,
    rank: int | None = None,
    size: float = 0.5,
    seed: int = 0,
) -> Problem:
    """The teacher sees the same states through another head: some change of the student's head makes KL zero.

    Args:
        fit: States to fit on.
        check: States to check on.
        tokens: Rows of both heads.
        width: Of the states.
        bias: Whether both have the same bias.
        transform: What follows both heads.
        rank: Of the difference between the heads.
        size: Of the entries of that difference.
        seed: Of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + 0.5 * torch.eye(width)
    states = torch.randn(fit + check, width, generator=generator) @ mixing
    weight = torch.randn(tokens, width, generator=generator) * 0.3
    inner = rank or width
    change = torch.randn(tokens, inner, generator=generator) @ torch.randn(inner, width, generator=generator)
    offset = torch.randn(tokens, generator=generator) if bias else None
    after = transform or LogitTransform()
    return Problem(
        state_pairs(states[:fit], states[:fit]),
        state_pairs(states[fit:], states[fit:]),
        Head(weight, offset, after),
        Head(weight + size * change / inner**0.5, offset, after),
    )
