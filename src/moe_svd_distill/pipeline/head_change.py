"""The change of a head that was trained: its rank, its figures at a scale, and what the adapter holds of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_svd_distill.pipeline.assembly import asked_head_rank
from moe_svd_distill.training.head_rank import choose_rank, head_factors
from moe_svd_distill.training.measuring import ComparedTokens, StatePairs, mean_kl, measure_states

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.algebra.figures import Measurement
    from moe_svd_distill.pipeline.stage import StageInput
    from moe_svd_distill.training.head import TrainedHead
    from moe_svd_distill.training.job import StudentInTraining
    from moe_svd_distill.training.lora_pairs import Pair
    from moe_svd_distill.training.text import TrainingText


class MovingHead:
    """The change of a trained head at a rank that keeps what it is worth.

    Attributes:
        choice: The rank.
    """

    def __init__(
        self, given: StageInput, trainee: StudentInTraining, head: TrainedHead, kl_before: float, origin: Tensor | None
    ) -> None:
        """Choose the rank on the checking text.

        Args:
            given: What the stage works with.
            trainee: The trained student.
            head: Its head.
            kl_before: On the checking text, before training.
            origin: The change that is left at scale 0, (v, d), at its own rank; None for none.
        """
        recipe, student = given.recipe, given.pair.student
        self._trainee, self._head, self._origin = trainee, head, origin
        self._dtype: torch.dtype = getattr(torch, recipe.dtype)
        self._rows = torch.from_numpy(given.fit_text.student_ids)
        self._vocabulary = student.architecture.head_slot.shape[0]
        asked, states = asked_head_rank(recipe, student.architecture.head), self._pairs(trainee.check, 1.0)

        def kl_of(change: Tensor) -> float:
            return mean_kl(states, trainee.student.plus(change), trainee.teacher)

        self.choice = choose_rank(head.delta, trainee.metric, asked, kl_of, kl_before, self._dtype)

    def figures(self, scale: float, text: TrainingText, places: ComparedTokens) -> Measurement:
        """Of the student with this share of the adapter, on a text."""
        trainee = self._trainee
        if scale == 0.0 and self._origin is not None:
            head = trainee.student.plus(self._origin.to(trainee.student.weight))
        else:
            left, right = self._factors(scale)
            head = trainee.student.plus(left.float() @ right.float())
        return measure_states(self._pairs(text, scale), places, head, trainee.teacher)

    def change(self, scale: float) -> tuple[Pair, Tensor]:
        """This share of it, over all rows of the head: ``(B, A)`` as stored, and their product, float32."""
        left, right = (factor.cpu() for factor in self._factors(scale))
        whole = torch.zeros(self._vocabulary, left.shape[1], dtype=self._dtype)
        delta = torch.zeros(self._vocabulary, right.shape[1])
        whole[self._rows] = left
        delta[self._rows] = left.float() @ right.float()
        return (whole, right), delta

    def _pairs(self, text: TrainingText, scale: float) -> StatePairs:
        """States of a text that is measured on, in the order of its places."""
        mine = self._trainee.states_of(text, scale)
        return StatePairs(mine, text.teacher, np.arange(len(mine)), text.teacher_position)

    def _factors(self, scale: float) -> tuple[Tensor, Tensor]:
        delta, metric = self._head.delta, self._trainee.metric
        if self._origin is not None:
            origin = self._origin.to(delta)
            return head_factors(origin + scale * (delta - origin), metric, self.choice.rank, self._dtype)
        left, right = head_factors(delta, metric, self.choice.rank, torch.float32)
        return (left * scale).to(self._dtype), right.to(self._dtype)
