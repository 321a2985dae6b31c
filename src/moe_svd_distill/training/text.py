"""What a student is trained on: sequences, and the teacher's final states beside their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]


Recorded: TypeAlias = Callable[[IntArray], list[Tensor]]
"""Numbers of sequences to what the first trained layer is given of them, (rows, …)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some sequences.

    Attributes:
        ids: Token ids of the student, (rows, length).
        position: Flat positions in them that have a teacher's state, (places,), ascending.
        teacher: The teacher's states there, (places, d_teacher).
        following: The token that follows each place, as an index into the common tokens; -1 where none does, (places,).
        inputs: What the first trained layer is given, (rows, …); nothing where that is the first of all.
    """

    ids: Tensor
    position: Tensor
    teacher: Tensor
    following: Tensor
    inputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class TrainingText:
    """Sequences, read by number.

    Attributes:
        ids: Token ids of the student, (n, length).
        position: Flat positions in them that have a teacher's state, (places,), ascending.
        teacher_position: The same places among the teacher's states, (places,).
        following: The token that follows, as an index into the common tokens; -1 where none does, (places,).
        teacher: All of the teacher's final states, (tokens, d_teacher); may be mapped from a file.
        inputs: What the first trained layer is given of these sequences; None where that is the first of all.
    """

    ids: IntArray
    position: IntArray
    teacher_position: IntArray
    following: IntArray
    teacher: Tensor
    inputs: Recorded | None = None

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def places(self, rows: IntArray) -> int:
        """Places of some sequences that have a teacher's state."""
        edges = np.searchsorted(self.position, np.stack([rows * self.length, (rows + 1) * self.length]))
        return int((edges[1] - edges[0]).sum())

    def take(self, rows: IntArray, device: torch.device) -> Batch:
        """Some sequences, in the given order."""
        length = self.length
        edges = np.searchsorted(self.position, np.stack([rows * length, (rows + 1) * length]))
        places = np.concatenate([np.arange(first, last) for first, last in edges.T])
        moved = np.concatenate(
            [
                self.position[first:last] + (place - row) * length
                for place, (row, (first, last)) in enumerate(zip(rows, edges.T, strict=True))
            ]
        )
        return Batch(
            torch.from_numpy(self.ids[rows]).to(device),
            torch.from_numpy(moved).to(device),
            self.teacher[torch.from_numpy(self.teacher_position[places])].to(device),
            torch.from_numpy(self.following[places]).to(device),
            () if self.inputs is None else tuple(tensor.to(device) for tensor in self.inputs(rows)),
        )

    def batches(self, rows: int, device: torch.device) -> Iterator[Batch]:
        """All of them in order, this many sequences at a time."""
        for begin in range(0, len(self), rows):
            yield self.take(np.arange(begin, min(begin + rows, len(self))), device)
