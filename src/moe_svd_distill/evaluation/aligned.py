"""A teacher with another tokenizer: compared at the places where both models have read the same characters.

Each model reads its own tokens. Distributions are taken over the tokens that both have and each is made to sum to 1
there, so a figure says nothing about what a model puts on tokens of its own; how much that is for the teacher is
measured beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.calibration.text import IntArray, TokenizedText
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.figures import Measurement
from moe_svd_distill.evaluation.from_states import (
    Hidden,
    Logits,
    Progress,
    Sums,
    TeacherStates,
    blocks_of,
    chunk_tokens,
    linear_logits,
    require_tokens,
)
from moe_svd_distill.evaluation.result import Aligned
from moe_svd_distill.fitting.check import Places, predicting_places


@dataclass(frozen=True, eq=False)
class AlignedRecord:
    """The record of a teacher with another tokenizer (see `from_states.Record`).

    Attributes:
        hidden: The teacher's states of its own reading of the text, (n, length-1, d_teacher).
        weight: The rows of its head for the common tokens, float32, (common, d_teacher).
        bias: (common,), or None.
        transform: What follows the head.
        places: Where the two are compared.
        student_ids: The common tokens as the student numbers them, (common,).
        measurement: The teacher's own figures at these places.
        text: The text as the student reads it.
        aligned: How much is compared.
    """

    hidden: Hidden
    weight: Tensor
    bias: Tensor | None
    transform: Logits
    places: Places
    student_ids: IntArray
    measurement: Measurement
    text: TokenizedText
    aligned: Aligned

    @property
    def vocabulary(self) -> int:
        """How many tokens both have."""
        return len(self.student_ids)

    @property
    def units(self) -> IntArray:
        """The independent unit of every place."""
        return self.places.unit

    def chunks(self, rows: slice, states: Tensor, logits: Logits) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits of the common tokens at every place."""
        mine, theirs = states.flatten(0, 1), self.hidden[rows].flatten(0, 1)
        ids, most = torch.from_numpy(self.student_ids), int(self.student_ids[-1]) + 1
        for part in _parts(self.places, rows, self.text.length, chunk_tokens(most)):
            given = logits(mine[part.student.to(mine.device)])
            require_tokens(given, most)
            given = given[:, ids.to(given.device)].float()
            wanted = linear_logits(
                theirs[part.teacher.to(theirs.device)], self.weight, self.bias, self.transform, self.vocabulary
            )
            yield wanted.to(given.device), given, part.target.to(given.device)


@torch.no_grad()
def align_teacher(teacher: TeacherStates, text: PairedText, on_progress: Progress | None = None) -> AlignedRecord:
    """Measure the teacher at the places where a student can be held against it, and keep what that takes.

    Args:
        teacher: Its states of `text.teacher`, and its head.
        text: The text as both read it.
        on_progress: Told about every batch.

    Raises:
        BadDataError: There is no such place.
    """
    places = _predicting(text)
    if not len(places.target):
        raise BadDataError(
            "At no place of the text have both models read the same characters before a token that both have",
            "Give more text, or another pair",
        )
    length, rows_of_head = text.teacher.length, len(teacher.weight)
    ids = torch.from_numpy(text.teacher_ids).to(teacher.weight.device)
    sums, mass = Sums(places.unit), 0.0
    for rows, states in blocks_of(teacher.hidden, "teacher's head", on_progress):
        flat = states.flatten(0, 1)
        for part in _parts(places, rows, length, chunk_tokens(rows_of_head)):
            chosen = flat[part.teacher.to(flat.device)]
            whole = linear_logits(chosen, teacher.weight, teacher.bias, teacher.transform, rows_of_head)
            common = whole[:, ids]
            mass += float((common.logsumexp(-1) - whole.logsumexp(-1)).exp().double().sum())
            sums.add(common, common, part.target.to(common.device), itself=True)
    count = len(places.target)
    aligned = Aligned(len(ids), count, count / text.student.predicted, mass / count)
    bias = None if teacher.bias is None else teacher.bias[ids]
    return AlignedRecord(
        teacher.hidden,
        teacher.weight[ids],
        bias,
        teacher.transform,
        places,
        text.student_ids,
        sums.measurement(),
        text.student,
        aligned,
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """Where the states of some places lie in a block of rows, and the tokens that follow; each (places,)."""

    student: Tensor
    teacher: Tensor
    target: Tensor


def _parts(places: Places, rows: slice, length: int, step: int) -> Iterator[_Part]:
    """The places of a block of rows, `step` at a time. Row i of both models holds the same text."""
    first, last = np.searchsorted(places.student_position, [rows.start * length, rows.stop * length])
    for begin in range(int(first), int(last), step):
        part = slice(begin, min(begin + step, int(last)))
        yield _Part(
            _predictor(places.student_position[part], rows.start, length),
            _predictor(places.teacher_position[part], rows.start, length),
            torch.from_numpy(places.target[part]),
        )


def _predictor(position: IntArray, row: int, length: int) -> Tensor:
    """From flat positions in a text to places among the states of its rows from `row` on, the last of each left out."""
    return torch.from_numpy((position // length - row) * (length - 1) + position % length)


def _predicting(text: PairedText) -> Places:
    """The places at which both models have another token to predict in their row."""
    places = predicting_places(text)
    length = text.teacher.length
    inside = places.teacher_position % length < length - 1
    if inside.all():
        return places
    _, unit = np.unique(places.unit[inside], return_inverse=True)
    return replace(
        places,
        student_position=places.student_position[inside],
        teacher_position=places.teacher_position[inside],
        target=places.target[inside],
        unit=unit.astype(np.int64),
    )
