"""Figures of a student on final states: the places that are compared, and KL, cross-entropy and agreement there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.divergence import kl_divergence, measure_tokens
from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.calibration.tokenizer import IntArray
from moe_svd_distill.streaming import Head
from moe_svd_distill.streaming.states_file import slices

_LOGIT_BYTES, _MOST_PLACES = 256 << 20, 4096


@dataclass(frozen=True)
class ComparedTokens:
    """Where both models predict a token that both have.

    Attributes:
        student_position: Flat positions in the student's sequences, (n,).
        teacher_position: The same for the teacher.
        target: The token that follows, as an index into the common tokens, (n,).
        unit: Document or sequence of that token, numbered without gaps, (n,).
    """

    student_position: IntArray
    teacher_position: IntArray
    target: IntArray
    unit: IntArray


def predicting_places(text: PairedText) -> ComparedTokens:
    """The places of a text whose next token lies in the same sequence and is one of the common tokens."""
    sequences = text.student.sequences
    length = sequences.shape[1]
    inside = text.student_position % length < length - 1
    student, teacher = text.student_position[inside], text.teacher_position[inside]
    following = student + 1
    common = np.full(int(max(sequences.max(), text.student_ids.max())) + 1, -1, dtype=np.int64)
    common[text.student_ids] = np.arange(len(text.student_ids))
    target = common[sequences.reshape(-1)[following]]
    real = (target >= 0) & (text.student.document_of_token.reshape(-1)[following] >= 0)
    _, unit = np.unique(np.asarray(text.student.units()).reshape(-1)[following[real]], return_inverse=True)
    return ComparedTokens(student[real], teacher[real], target[real], unit.astype(np.int64))


@dataclass(frozen=True, eq=False)
class StatePairs:
    """Final states of student and teacher at the same places of a text; either may be mapped from a file.

    Attributes:
        student: All of the student's states, (tokens, d_student).
        teacher: All of the teacher's, (tokens, d_teacher).
        student_position: Which of the student's are used, (n,).
        teacher_position: The teacher's beside them, (n,).
    """

    student: Tensor
    teacher: Tensor
    student_position: IntArray
    teacher_position: IntArray

    @classmethod
    def in_step(cls, student: Tensor, teacher: Tensor) -> StatePairs:
        """Each of the student's states beside the teacher's of the same number."""
        every = np.arange(len(student))
        return cls(student, teacher, every, every)

    def __len__(self) -> int:
        return len(self.student_position)

    def in_order(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them, ``size`` places at a time, (n, d_student) and (n, d_teacher), float32."""
        for part in slices(len(self), size):
            mine = self.student[torch.from_numpy(self.student_position[part])]
            theirs = self.teacher[torch.from_numpy(self.teacher_position[part])]
            yield mine.to(device, torch.float32), theirs.to(device, torch.float32)


def measure_states(pairs: StatePairs, places: ComparedTokens, student: Head, teacher: Head) -> Measurement:
    """Figures over the common tokens.

    Args:
        pairs: States at exactly these places, in this order.
        places: Targets and documents.
        student: The student's head over the common tokens.
        teacher: The teacher's.
    """

    def chunks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        begin = 0
        for wanted, found in _logits(pairs, student, teacher):
            target = torch.from_numpy(places.target[begin : begin + len(found)]).to(found.device)
            begin += len(found)
            yield wanted, found, target

    return measure_tokens(chunks(), places.unit)


@torch.no_grad()
def summed_kl(pairs: StatePairs, student: Head, teacher: Head) -> Tensor:
    """KL(teacher ‖ student) over the common tokens, summed over the places, in nats; float64."""
    total = torch.zeros((), dtype=torch.float64, device=student.weight.device)
    for wanted, found in _logits(pairs, student, teacher):
        total += kl_divergence(wanted, found).double().sum()
    return total


def mean_kl(pairs: StatePairs, student: Head, teacher: Head) -> float:
    """The same in nats per place."""
    return float(summed_kl(pairs, student, teacher)) / len(pairs)


@torch.no_grad()
def _logits(pairs: StatePairs, student: Head, teacher: Head) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of teacher and student, some places at a time, in order."""
    step = min(max(1, _LOGIT_BYTES // (4 * len(student.weight))), _MOST_PLACES)
    for mine, theirs in pairs.in_order(step, student.weight.device):
        yield teacher.logits(theirs), student.logits(mine)
