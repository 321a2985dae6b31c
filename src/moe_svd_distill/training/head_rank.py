"""The head's change as factors of a rank that keeps what the change is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from moe_svd_distill.algebra.whitening import Whitening, truncated_in_metric

SERVED_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""The ranks vLLM has kernels for, from the smallest that is worth having for a head."""
KEPT_SHARE = 0.98
_TINY = 1e-12
HeadRank: TypeAlias = int | Literal["auto", "full"]


@dataclass(frozen=True)
class RankTrial:
    """What a rank keeps.

    Attributes:
        rank: Tried.
        kl: On the checking text, in nats per token.
        share: One less what is lost of the whole change's fall of KL. Where there is next to no fall, as after a start
            that was good already, a tenth of the KL that is left counts in its place.
    """

    rank: int
    kl: float
    share: float


@dataclass(frozen=True)
class RankChoice:
    """The rank taken and what was tried for it."""

    rank: int
    trials: tuple[RankTrial, ...]


def choose_rank(
    delta: Tensor,
    metric: Whitening,
    asked: HeadRank,
    kl_of: Callable[[Tensor], float],
    untouched_kl: float,
    dtype: torch.dtype,
) -> RankChoice:
    """The rank of the head's pair.

    Args:
        delta: Change of the head, (v, d).
        metric: Second moment of the states it is applied to.
        asked: A number; `full` for the width; `auto` for the smallest rank that a server takes and that keeps 98 % of
            the fall of KL on the checking text, at most 512.
        kl_of: Change of the head, (v, d), to KL on text the head was not trained on, in nats per token.
        untouched_kl: The same of the untouched student.
        dtype: Type the factors are stored in.
    """
    width = min(delta.shape)
    if asked == "auto":
        candidates = [rank for rank in SERVED_RANKS if rank < width] + ([width] if width <= SERVED_RANKS[-1] else [])
    else:
        candidates = [width if asked == "full" else int(asked)]
    whole = kl_of(delta)
    trials = []
    for rank in candidates:
        left, right = head_factors(delta, metric, rank, dtype)
        kl = kl_of(left.float() @ right.float())
        trials.append(RankTrial(rank, kl, 1 - (kl - whole) / max(untouched_kl - whole, whole / 10, _TINY)))
        if trials[-1].share >= KEPT_SHARE:
            break
    return RankChoice(trials[-1].rank, tuple(trials))


def head_factors(delta: Tensor, metric: Whitening, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(B, A)`` as stored; ranks above the width are padded with zeros, so that a rank that was asked for is kept."""
    width = min(delta.shape)
    b, a = truncated_in_metric(delta, metric, min(rank, width))
    if rank > width:
        b = torch.nn.functional.pad(b, (0, rank - width))
        a = torch.nn.functional.pad(a, (0, 0, 0, rank - width))
    return b.to(dtype), a.to(dtype)
