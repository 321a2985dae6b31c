"""Figures from final hidden states and heads, wherever the states came from: a model in memory, or a file.

The logits of more than a few hundred tokens never exist: states and heads are kept, and both models' exact
distributions are computed again from these, chunk by chunk.

With different tokenizers each model reads its own tokens, and they are compared at the places where both have read the
same characters. Distributions are then taken over the tokens that both have and each is made to sum to 1 there, so a
figure says nothing about what a model puts on tokens of its own; how much that is for the teacher is measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.divergence import measure_tokens
from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.calibration.tokenizer import IntArray
from moe_svd_distill.errors import BadDataError, IncompatiblePairError
from moe_svd_distill.evaluation.request import Progress
from moe_svd_distill.evaluation.result import Aligned
from moe_svd_distill.streaming import Head, head_over_common_tokens
from moe_svd_distill.training.measuring import ComparedTokens, predicting_places

Block: TypeAlias = tuple[slice, Tensor]
"""Rows of a text, and their states at every position that predicts, (rows, length-1, d)."""

Logits: TypeAlias = Callable[[Tensor], Tensor]
"""From states, (tokens, d), to logits, (tokens, vocabulary)."""

Chunk: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Logits of teacher and student over the common tokens, (tokens, common), and the tokens that follow, (tokens,)."""

LOGIT_BYTES = 64 << 20  # of one model's logits, float32, at a time
BLOCK_TOKENS = 2048


class Hidden(Protocol):
    """Final hidden states at every position that predicts, (n, length-1, d), read as they are asked for."""

    @property
    def shape(self) -> Any:
        """(n, length-1, d)."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model computed in."""

    def __getitem__(self, rows: Any, /) -> Tensor:
        """The states of some rows, (rows, length-1, d)."""


class Reader(Protocol):
    """Takes from each chunk of tokens what it needs."""

    def add(self, wanted: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Logits of teacher and student, (tokens, vocabulary), and the tokens that follow, (tokens,); on one device."""


@dataclass(frozen=True, eq=False)
class TeacherRecord:
    """All that is kept of the teacher after its one pass, and the places at which a student is held against it.

    Attributes:
        hidden: Its states after the last norm, of its own reading of the text, (n, length-1, d_teacher): a tensor on
            the CPU, which may be mapped from a file, or anything that reads like one.
        head: Its head over the common tokens, float32.
        places: Where the two are compared.
        student_ids: The common tokens as the student numbers them, (common,), ascending.
        measurement: The teacher's own figures at these places (KL 0, agreement 1).
        text: The text as the student reads it.
        aligned: How much is compared; None where both models number their tokens alike, so that all of it is.
    """

    hidden: Hidden
    head: Head
    places: ComparedTokens
    student_ids: IntArray
    measurement: Measurement
    text: TokenizedText
    aligned: Aligned | None

    @property
    def vocabulary(self) -> int:
        """How many tokens the distributions are taken over."""
        return len(self.student_ids)

    @property
    def units(self) -> IntArray:
        """The independent unit of every place, in the order of the text."""
        return self.places.unit

    def chunks(self, rows: slice, states: Tensor, logits: Logits) -> Iterator[Chunk]:
        """Teacher's and student's logits and the tokens that follow at the places of some rows, a few at a time.

        Args:
            rows: Rows of the text.
            states: The student's states of these, (rows, length-1, d).
            logits: The student's head.

        Raises:
            IncompatiblePairError: The student's head has fewer tokens than are compared.
        """
        student, teacher = states.flatten(0, 1), self.hidden[rows].flatten(0, 1)
        _require_states(rows, self.text.length, student, teacher)
        ids, most = torch.from_numpy(self.student_ids), int(self.student_ids[-1]) + 1
        for of_student, of_teacher, target in _parts(self.places, rows, self.text.length, _chunk_tokens(most)):
            given = logits(student[of_student.to(student.device)])
            if given.shape[-1] < most:
                raise IncompatiblePairError(
                    f"The student's head has {given.shape[-1]} tokens, fewer than the {most} to compare",
                    "Compare only the tokens both models have",
                )
            given = (given[:, :most] if most == len(ids) else given[:, ids.to(given.device)]).float()
            wanted = self.head.logits(teacher[of_teacher.to(teacher.device)])
            yield wanted.to(given.device), given, target.to(given.device)


def record_states(hidden: Hidden, head: Head, text: PairedText, on_progress: Progress | None = None) -> TeacherRecord:
    """Measure the teacher at the places where a student can be held against it, and keep what that takes.

    Args:
        hidden: Its states of `text.teacher`.
        head: Its whole head, float32; of tokens that are numbered alike, those beyond it are not compared.
        text: The text as both read it.
        on_progress: Told about every batch.

    Raises:
        BadDataError: There is no such place, or the figures are not finite.
    """
    if text.identical and len(head.weight) < len(text.teacher_ids):
        ids = text.teacher_ids[: len(head.weight)]
        text = replace(text, student_ids=ids, teacher_ids=ids)
    places = _predicting(text)
    if not len(places.target):
        raise BadDataError(
            "At no place of the text have both models read the same characters before a token that both have",
            "Give more text, or another pair",
        )
    common_head, length, mass = head_over_common_tokens(head, text.teacher_ids), text.teacher.length, 0.0
    ids_of_head = torch.from_numpy(text.teacher_ids).to(head.weight.device)

    def chunks() -> Iterator[Chunk]:
        nonlocal mass
        for rows, states in blocks_of(hidden, "teacher's head", on_progress):
            flat = states.flatten(0, 1)
            _require_states(rows, length, flat)
            for _, of_teacher, target in _parts(places, rows, length, _chunk_tokens(len(head.weight))):
                chosen = flat[of_teacher.to(flat.device)]
                if text.identical:
                    common = common_head.logits(chosen)
                else:
                    whole = head.logits(chosen)
                    common = whole[:, ids_of_head]
                    mass += float((common.logsumexp(-1) - whole.logsumexp(-1)).exp().double().sum())
                yield common, common, target.to(common.device)

    measurement, count = _finite(measure_tokens(chunks(), places.unit), "teacher"), len(places.target)
    compared = Aligned(len(text.teacher_ids), count, count / text.student.predicted, mass / count)
    aligned = None if text.identical else compared
    return TeacherRecord(hidden, common_head, places, text.student_ids, measurement, text.student, aligned)


@torch.no_grad()
def compare(
    blocks: Iterable[Block], logits: Logits, teacher: TeacherRecord, name: str, readers: Sequence[Reader] = ()
) -> Measurement:
    """Measure a student by its states on the text the teacher has read.

    Args:
        blocks: The student's states; every row once, in the order of the text.
        logits: The student's head with all that follows it.
        teacher: The record of the teacher's pass.
        name: Whose figures these are, for an error.
        readers: Who else looks at every chunk of logits.

    Raises:
        IncompatiblePairError: The student's head has fewer tokens than are compared.
        BadDataError: The figures are not finite.
    """

    def chunks() -> Iterator[Chunk]:
        for rows, states in blocks:
            for chunk in teacher.chunks(rows, states, logits):
                for reader in readers:
                    reader.add(*chunk)
                yield chunk

    return _finite(measure_tokens(chunks(), teacher.units), name)


def _finite(measurement: Measurement, name: str) -> Measurement:
    if not np.isfinite(measurement.kl).all() or not np.isfinite(measurement.cross_entropy).all():
        raise BadDataError(
            f"The figures of the {name} are not finite", "Check models and adapter for NaN, or compute in a wider type"
        )
    return measurement


def blocks_of(hidden: Hidden, name: str, on_progress: Progress | None = None) -> Iterator[Block]:
    """Read stored states block by block, in order."""
    rows, length = int(hidden.shape[0]), int(hidden.shape[1]) + 1
    step = max(1, BLOCK_TOKENS // length)
    if on_progress:
        on_progress(name, 0, rows * length)
    for begin in range(0, rows, step):
        block = slice(begin, min(begin + step, rows))
        yield block, hidden[block]
        if on_progress:
            on_progress(name, block.stop * length, rows * length)


def _chunk_tokens(vocabulary: int) -> int:
    """How many tokens' logits may exist at a time."""
    return max(1, LOGIT_BYTES // (4 * vocabulary))


def _require_states(rows: slice, length: int, *flat: Tensor) -> None:
    predicting = (rows.stop - rows.start) * (length - 1)
    if any(len(states) != predicting for states in flat):
        raise ValueError(f"{' and '.join(str(len(states)) for states in flat)} states for {predicting} positions")


def _parts(places: ComparedTokens, rows: slice, length: int, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The places of a block of rows, `step` at a time. Row i of both models holds the same text.

    Returns:
        Where their states lie among those of the block, for student and teacher, and the tokens that follow; (places,)
        each.
    """
    first, last = np.searchsorted(places.student_position, [rows.start * length, rows.stop * length])
    for begin in range(int(first), int(last), step):
        part = slice(begin, min(begin + step, int(last)))
        of_student, of_teacher = (
            _predictor(position[part], rows.start, length)
            for position in (places.student_position, places.teacher_position)
        )
        yield of_student, of_teacher, torch.from_numpy(places.target[part])


def _predictor(position: IntArray, row: int, length: int) -> Tensor:
    """From flat positions in a text to places among the states of its rows from `row` on, the last of each left out."""
    return torch.from_numpy((position // length - row) * (length - 1) + position % length)


def _predicting(text: PairedText) -> ComparedTokens:
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
