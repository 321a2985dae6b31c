"""The student's head in training: the loss, its gradient by the student's final states, and the head's own.

The head is moved in coordinates in which the states have unit second moment (docs/decisions/0010), or it stands still.
Where it does and the divergence allows it, `fixed_head` takes the place of this.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_svd_distill.algebra.divergence import divergence_and_gradient
from moe_svd_distill.algebra.whitening import Whitening
from moe_svd_distill.streaming import Head
from moe_svd_distill.streaming.states_file import slices
from moe_svd_distill.training.measuring import StatePairs, summed_kl
from moe_svd_distill.training.settings import TrainingSettings
from moe_svd_distill.training.text import Batch

LOGIT_BYTES = 128 << 20
"""Of the logits that are computed at once."""


class TrainedHead:
    """A head and what it is trained by.

    Attributes:
        values: What moves, flat float32; empty where the head stands still.
        gradient: Of the summed loss, flat, of the same length.
    """

    def __init__(
        self,
        student: Head,
        teacher: Head,
        metric: Whitening,
        settings: TrainingSettings,
        start: Tensor | None = None,
    ) -> None:
        """Begin with a change of the head.

        Args:
            student: The head over the common tokens; where its weight lies is where this computes.
            teacher: The teacher's over the same.
            metric: Second moment of the student's states.
            settings: Whether the head moves, and the loss.
            start: Change of the student's weight, (v, d); None for none.
        """
        self._student, self._teacher, self._metric = student, teacher, metric
        self._settings, self._moves = settings, settings.head == "whole"
        self._origin = student.weight @ metric.root
        first = self._origin if start is None else (student.weight + start.to(student.weight)) @ metric.root
        self._weights = first.clone()
        self.values = self._weights.view(-1) if self._moves else self._weights.new_zeros(0)
        self.gradient = torch.zeros_like(self.values)
        self.loss = torch.zeros((), dtype=torch.float64)

    @property
    def delta(self) -> Tensor:
        """Change of the student's weight, (v, d)."""
        return (self._weights - self._origin) @ self._metric.inverse

    def reset_to_zero(self) -> None:
        """Undo every change, the start's as well, of a head that moves."""
        if self._moves:
            self._weights.copy_(self._origin)

    def head(self) -> Head:
        """The head as it is now."""
        return replace(self._student, weight=self._weights @ self._metric.inverse)

    def divergence(self, states: Tensor, batch: Batch) -> Tensor:
        """Forward KL of the head as it is now from the teacher, summed over the places, in nats; float64.

        Args:
            states: The student's final states at the places of the batch, (b, d).
            batch: With the teacher's states.
        """
        return summed_kl(StatePairs.in_step(states, batch.teacher), self.head(), self._teacher)

    @torch.no_grad()
    def accumulate_gradients(self, states: Tensor, batch: Batch, places: int) -> Tensor:
        """Gradient of the mean loss by the states, (b, d); the head's own is added to `gradient`.

        Args:
            states: The student's final states at the places of the batch, (b, d).
            batch: With the teacher's states.
            places: Places of the whole step, over which the loss is a mean.
        """
        slopes = []
        for part in slices(len(states), max(1, LOGIT_BYTES // (4 * len(self._weights)))):
            inputs = states[part].float() @ self._metric.inverse
            head = replace(self._student, weight=self._weights)
            logits = head.logits(inputs)
            loss, error = divergence_and_gradient(
                self._teacher.logits(batch.teacher[part]),
                logits,
                self._settings.divergence,
                batch.following[part],
                self._settings.cross_entropy_share,
            )
            self.loss += loss.double().sum().cpu() / places
            error = self._student.transform.pull_back(error, logits).div_(places)
            slopes.append((error @ self._weights) @ self._metric.inverse)
            if self._moves:
                self.gradient.view_as(self._weights).addmm_(error.T, inputs)
        return torch.cat(slopes)
