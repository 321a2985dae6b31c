"""What a fit of the head takes its states from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.fitting.pairs import StatePairs, second_moment

_LARGEST_BATCH, _SMALLEST_BATCH, _BATCHES = 768, 128, 256


class Source(Protocol):
    """Where the states come from that the head is fitted on: files, or the last layers that are fitted with it."""

    @property
    def batches(self) -> int:
        """Steps of one pass."""

    def moment(self, device: torch.device) -> Tensor:
        """``E[x xᵀ]`` of the student's states before the fit, (d, d)."""

    def begin(self, order: NDArray[np.int64], place: int) -> tuple[Tensor, Tensor]:
        """States of student and teacher for one step of a pass, (b, d_student) and (b, d_teacher)."""

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """The order of a pass."""

    def end(self, gradient: Callable[[], Tensor], step: int, share: float) -> None:
        """Take the gradient by the student's states of `begin`, (b, d), and move along it.

        Args:
            gradient: Computes it; not called where nothing moves.
            step: Number of the step, from 1.
            share: Of the largest step size.
        """

    def check(self) -> StatePairs:
        """States of the checking text as they are now."""

    def tensors(self) -> dict[str, Tensor]:
        """What else must be on the disk to go on from here."""

    def reset(self, halvings: int) -> None:
        """Back to the beginning, with steps halved so often."""

    def settle(self) -> None:
        """Called after something was written into `tensors`."""


def batch_places(count: int) -> int:
    """Places of a step where only the head moves, for so many in all."""
    return int(np.clip(count // _BATCHES, _SMALLEST_BATCH, _LARGEST_BATCH))


class StateSource:
    """States from files; only the head moves."""

    def __init__(self, fit: StatePairs, check: StatePairs, device: torch.device) -> None:
        self._fit, self._check, self._device = fit, check, device
        self._batch = batch_places(len(fit))
        self.batches = max(1, len(fit) // self._batch)

    def moment(self, device: torch.device) -> Tensor:
        """As `Source`."""
        return second_moment(self._fit, device)

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """As `Source`."""
        return generator.permutation(len(self._fit))

    def begin(self, order: NDArray[np.int64], place: int) -> tuple[Tensor, Tensor]:
        """As `Source`."""
        return self._fit.gather(order[place * self._batch : (place + 1) * self._batch], self._device)

    def end(self, gradient: Callable[[], Tensor], step: int, share: float) -> None:
        """As `Source`: nothing."""

    def check(self) -> StatePairs:
        """As `Source`."""
        return self._check

    def tensors(self) -> dict[str, Tensor]:
        """As `Source`: nothing."""
        return {}

    def reset(self, halvings: int) -> None:
        """As `Source`: nothing."""

    def settle(self) -> None:
        """As `Source`: nothing."""
