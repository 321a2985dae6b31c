"""What a student is trained on: sequences, and the teacher's final states beside their places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.calibration.tokenizer import IntArray
from moe_svd_distill.streaming import LayerInputs
from moe_svd_distill.streaming.states_file import StatesFile

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

    def batches(self, tokens: int, device: torch.device, rows: IntArray | None = None) -> list[Batch]:
        """Some sequences in the given order, or all of them, about this many tokens at a time."""
        rows, together = np.arange(len(self)) if rows is None else rows, max(1, tokens // self.length)
        return [self.take(rows[begin : begin + together], device) for begin in range(0, len(rows), together)]


@dataclass(frozen=True, eq=False)
class InputsFile:
    """What a pass has recorded of a text at the layer that training begins at; behind the last, final states.

    Attributes:
        path: Of the file.
        layer: Number of the layer; None for final states.
        numbers: Which of the file's sequences these are, or of final states which of its places, in order.
    """

    path: Path
    layer: int | None
    numbers: IntArray

    def open(self, dtype: torch.dtype) -> Recorded:
        """Mapped into memory; what is not whole numbers is handed out in a type."""
        if self.layer is None:
            states = StatesFile(self.path).rows(slice(None)).flatten(0, 1)
            return lambda rows: [states[torch.from_numpy(self.numbers[rows])][:, None].to(dtype)]
        inputs = LayerInputs(self.layer, self.path)

        def recorded(rows: IntArray) -> list[Tensor]:
            each = [inputs.rows(slice(number, number + 1)) for number in self.numbers[rows].tolist()]
            found = [torch.cat(tensors) for tensors in zip(*each, strict=True)]
            return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in found]

        return recorded


@dataclass(frozen=True, eq=False)
class TextFile:
    """A `TrainingText` whose states lie in files of `streaming`."""

    ids: IntArray
    position: IntArray
    teacher_position: IntArray
    following: IntArray
    states: Path
    inputs: InputsFile | None = None

    def open(self, dtype: torch.dtype = torch.float32) -> TrainingText:
        """With the states mapped into memory, and what layers are given in the type they compute in."""
        states = StatesFile(self.states).rows(slice(None)).flatten(0, 1)
        inputs = None if self.inputs is None else self.inputs.open(dtype)
        return TrainingText(self.ids, self.position, self.teacher_position, self.following, states, inputs)
