"""The change of a head that was trained: its rank, its figures at a scale, and what the adapter holds of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_svd_distill.fitting.check import Places, measure_states
from moe_svd_distill.fitting.pairs import Segment, StatePairs
from moe_svd_distill.fitting.rank import choose_rank, head_factors
from moe_svd_distill.pipeline.assembly import asked_head_rank
from moe_svd_distill.pipeline.fitted import HeadChange

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from moe_svd_distill.algebra.figures import Measurement
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.recipe import Recipe
    from moe_svd_distill.training.head import TrainedHead
    from moe_svd_distill.training.job import Trainee
    from moe_svd_distill.training.text import TrainingText


class MovingHead:
    """The change of a trained head at a rank that keeps what it is worth."""

    def __init__(
        self,
        recipe: Recipe,
        pair: ModelPair,
        student_ids: NDArray[np.int64],
        trainee: Trainee,
        head: TrainedHead,
        kl_before: float,
    ) -> None:
        """Choose the rank on the checking text.

        Args:
            recipe: What is asked for.
            pair: Teacher and student.
            student_ids: Rows of the student's head that stand for the common tokens.
            trainee: The trained student.
            head: Its head.
            kl_before: On the checking text, before training.
        """
        self._trainee, self._head = trainee, head
        self._dtype: torch.dtype = getattr(torch, recipe.dtype)
        self._rows = torch.from_numpy(student_ids)
        self._vocabulary = pair.student.architecture.head_slot.shape[0]
        self.choice = choose_rank(
            head.delta,
            trainee.metric,
            asked_head_rank(recipe, pair.student.architecture.head),
            self._pairs(trainee.check, 1.0),
            trainee.student,
            trainee.teacher,
            kl_before,
            self._dtype,
        )

    def figures(self, scale: float, text: TrainingText, places: Places) -> Measurement:
        """Of the student with this share of the adapter, on a text."""
        trainee, (left, right) = self._trainee, self._factors(scale)
        head = trainee.student.plus(left.float() @ right.float())
        return measure_states(self._pairs(text, scale), places, head, trainee.teacher)

    def change(self, scale: float) -> HeadChange:
        """This share of it, over all rows of the head."""
        left, right = (factor.cpu() for factor in self._factors(scale))
        whole = torch.zeros(self._vocabulary, left.shape[1], dtype=self._dtype)
        delta = torch.zeros(self._vocabulary, right.shape[1])
        whole[self._rows] = left
        delta[self._rows] = left.float() @ right.float()
        return HeadChange((whole, right), delta)

    def _pairs(self, text: TrainingText, scale: float) -> StatePairs:
        """States of a text that is measured on, in the order of its places."""
        mine = self._trainee.states_of(text, scale)
        return StatePairs([Segment(mine, text.teacher, np.arange(len(mine)), text.teacher_position)])

    def _factors(self, scale: float) -> tuple[Tensor, Tensor]:
        left, right = head_factors(self._head.delta, self._trainee.metric, self.choice.rank, torch.float32)
        return (left * scale).to(self._dtype), right.to(self._dtype)
