"""Final hidden states of student and teacher at the same places in a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segment:
    """States of one stretch of text, which may be mapped from a file; row i of both belongs to the same place.

    Attributes:
        student: All of the student's states, (tokens, d_student).
        teacher: All of the teacher's, (tokens, d_teacher).
        student_position: Which of the student's are used, (n,).
        teacher_position: The teacher's beside them, (n,).
    """

    student: Tensor
    teacher: Tensor
    student_position: NDArray[np.int64]
    teacher_position: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.student_position)


class StatePairs:
    """Segments one after the other, read by number."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._ends = np.cumsum([len(segment) for segment in self.segments])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, numbers: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """States of student and teacher, (b, d_student) and (b, d_teacher), float32, sorted by number."""
        numbers = np.sort(numbers)
        students, teachers = [], []
        begin = 0
        for segment, end in zip(self.segments, self._ends, strict=True):
            inside = numbers[(numbers >= begin) & (numbers < end)] - begin
            if len(inside):
                students.append(segment.student[torch.from_numpy(segment.student_position[inside])])
                teachers.append(segment.teacher[torch.from_numpy(segment.teacher_position[inside])])
            begin = int(end)
        return (
            torch.cat(students).to(device, torch.float32),
            torch.cat(teachers).to(device, torch.float32),
        )

    def in_order(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """All states, ``size`` places at a time."""
        for begin in range(0, len(self), size):
            yield self.gather(np.arange(begin, min(begin + size, len(self))), device)


def second_moment(pairs: StatePairs, device: torch.device) -> Tensor:
    """``E[x xᵀ]`` of the student's states, (d, d), summed in float64."""
    total: Tensor | None = None
    for states, _ in pairs.in_order(8192, device):
        product = (states.T @ states).double()
        total = product if total is None else total + product
    assert total is not None
    return (total / len(pairs)).float()
