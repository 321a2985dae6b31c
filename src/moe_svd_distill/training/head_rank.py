"""The change of a head that was trained: its rank, its figures at a scale, and what an adapter holds of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.whitening import Whitening, truncated_in_metric
from moe_svd_distill.training.lora_pairs import with_rank
from moe_svd_distill.training.measuring import ComparedTokens, StatePairs, mean_kl, measure_states

if TYPE_CHECKING:
    from moe_svd_distill.algebra.figures import Measurement
    from moe_svd_distill.training.head import TrainedHead
    from moe_svd_distill.training.job import StudentInTraining
    from moe_svd_distill.training.lora_pairs import Pair
    from moe_svd_distill.training.text import TrainingText

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


def choose_rank(
    delta: Tensor,
    metric: Whitening,
    asked: HeadRank,
    kl_of: Callable[[Tensor], float],
    untouched_kl: float,
    dtype: torch.dtype,
) -> tuple[RankTrial, ...]:
    """The ranks that are tried for the head's pair, the one that is taken last.

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
    return tuple(trials)


def head_factors(delta: Tensor, metric: Whitening, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(B, A)`` as stored; ranks above the width are padded with zeros, so that a rank that was asked for is kept."""
    b, a = with_rank(truncated_in_metric(delta, metric, min(rank, *delta.shape)), rank)
    return b.to(dtype), a.to(dtype)


class MovingHead:
    """The change of a trained head at a rank that keeps what it is worth.

    Attributes:
        trials: Of ranks, in order.
        rank: The one taken.
    """

    def __init__(
        self,
        trainee: StudentInTraining,
        head: TrainedHead,
        asked: HeadRank,
        kl_before: float,
        dtype: torch.dtype,
        origin: Tensor | None,
    ) -> None:
        """Choose the rank on the checking text.

        Args:
            trainee: The trained student.
            head: Its head.
            asked: As of `choose_rank`.
            kl_before: On the checking text, before training.
            dtype: Type the factors are stored in.
            origin: The change that is left at scale 0, (v, d), at its own rank; None for none.
        """
        self._trainee, self._head, self._origin, self._dtype = trainee, head, origin, dtype
        states = self._pairs(trainee.check, 1.0)

        def kl_of(change: Tensor) -> float:
            return mean_kl(states, trainee.student.plus(change), trainee.teacher)

        self.trials = choose_rank(head.delta, trainee.metric, asked, kl_of, kl_before, self._dtype)
        self.rank = self.trials[-1].rank

    def figures(self, scale: float, text: TrainingText, places: ComparedTokens) -> Measurement:
        """Of the student with this share of the adapter, on a text."""
        trainee = self._trainee
        if scale == 0.0 and self._origin is not None:
            head = trainee.student.plus(self._origin.to(trainee.student.weight))
        else:
            left, right = self._factors(scale)
            head = trainee.student.plus(left.float() @ right.float())
        return measure_states(self._pairs(text, scale), places, head, trainee.teacher)

    def change(self, scale: float, vocabulary: int) -> tuple[Pair, Tensor]:
        """This share of it, over all rows of the head: ``(B, A)`` as stored, and their product, float32."""
        left, right = (factor.cpu() for factor in self._factors(scale))
        rows = torch.from_numpy(self._trainee.student_ids)
        whole = torch.zeros(vocabulary, left.shape[1], dtype=self._dtype)
        delta = torch.zeros(vocabulary, right.shape[1])
        whole[rows] = left
        delta[rows] = left.float() @ right.float()
        return (whole, right), delta

    def _pairs(self, text: TrainingText, scale: float) -> StatePairs:
        """States of a text that is measured on, in the order of its places."""
        mine = self._trainee.states_of(text, scale)
        return StatePairs(mine, text.teacher, np.arange(len(mine)), text.teacher_position)

    def _factors(self, scale: float) -> tuple[Tensor, Tensor]:
        delta, metric = self._head.delta, self._trainee.metric
        if self._origin is not None:
            origin = self._origin.to(delta)
            return head_factors(origin + scale * (delta - origin), metric, self.rank, self._dtype)
        left, right = head_factors(delta, metric, self.rank, torch.float32)
        return (left * scale).to(self._dtype), right.to(self._dtype)
