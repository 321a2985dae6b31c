"""Where two tokenisations have read the same characters, and packing one text for both into rows that hold the same.

Each row of both begins and ends at a character where both tokenisations have a boundary; what is left of a row is
padded. So wherever two positions of a row align, both models have seen the same context, up to the row's beginning: had
each model's tokens been packed by themselves, rows would begin at different characters, and the difference between the
models would partly be one of context. Padding costs a few tokens a row, and the difference in tokens for the same text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.text import (
    TextPart,
    TokenizedText,
    batches,
    ended,
    fits,
    too_short,
)
from moe_svd_distill.calibration.tokenizer import IntArray, Tokenizer, TokenSpans

_ALIGNED_CHARACTERS = 1 << 20  # given to both tokenizers at a time


def clean_cuts(spans: TokenSpans, characters: int) -> tuple[IntArray, IntArray]:
    """After which tokens a whole number of characters has been read, with none in between left out.

    Characters that take several tokens (bytes of a multi-byte character) are not read until the last of them, and one
    that a normaliser folded into its neighbour gives no cut beside it.

    Args:
        spans: The tokens of a text.
        characters: Characters of that text.

    Returns:
        Characters read, (cuts,), ascending and above 0; and tokens read by then, (cuts,), special ones before and
        between included.
    """
    place = np.flatnonzero(spans.read)
    if not len(place):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    reached = np.maximum.accumulate(spans.end[place])
    to_come = np.minimum.accumulate(spans.begin[place][::-1])[::-1]
    clean = reached == np.append(to_come[1:], characters)
    read, tokens = reached[clean], place[clean] + 1
    last = np.append(read[1:] != read[:-1], True) if len(read) else np.zeros(0, dtype=bool)
    kept = last & (read > 0)
    return read[kept], tokens[kept]


def common_cuts(student: TokenSpans, teacher: TokenSpans, characters: int) -> IntArray:
    """Tokens that each of two models has read where both have read exactly the same characters.

    Args:
        student: One tokenisation of a text.
        teacher: The other.
        characters: Characters of that text.

    Returns:
        (cuts, 2), ascending in both columns: student tokens, teacher tokens.
    """
    student_read, student_tokens = clean_cuts(student, characters)
    teacher_read, teacher_tokens = clean_cuts(teacher, characters)
    _, of_student, of_teacher = np.intersect1d(student_read, teacher_read, assume_unique=True, return_indices=True)
    return np.stack([student_tokens[of_student], teacher_tokens[of_teacher]], axis=1).astype(np.int64)


@dataclass(frozen=True)
class _PairedDocument:
    """One document in both tokenisations, cut where it is to end, each ended.

    A row may end at its `breaks`, (breaks, 2): where both have read the same characters, and last at its end.
    """

    document: Document
    ids: tuple[IntArray, IntArray]
    breaks: IntArray


@dataclass
class _Rows:
    """Rows of both models under construction, column 0 the student and 1 the teacher."""

    length: int
    filler: tuple[int, int]
    done: int = 0
    tokens: int = 0
    used: list[int] = field(default_factory=lambda: [0, 0])
    sequences: tuple[list[IntArray], list[IntArray]] = field(default_factory=lambda: ([], []))
    owners: tuple[list[IntArray], list[IntArray]] = field(default_factory=lambda: ([], []))
    positions: list[IntArray] = field(default_factory=list)

    def add(self, paired: _PairedDocument, number: int, wanted: float) -> bool:
        """Write a document, until `wanted` student tokens are there; False if a stretch of it fits in no row."""
        at = np.zeros(2, dtype=np.int64)
        end = paired.breaks[-1]
        while (at < end).any() and self.tokens < wanted:
            room = self.length - np.asarray(self.used)
            reachable = np.flatnonzero((paired.breaks - at <= room).all(axis=1) & (paired.breaks > at).any(axis=1))
            if not len(reachable):
                if not any(self.used):
                    return False
                self.finish()
                continue
            enough = np.flatnonzero(paired.breaks[:, 0] - at[0] >= wanted - self.tokens)
            to = paired.breaks[min([reachable[-1], *enough[:1]])]
            for side in (0, 1):
                self._write(side, paired.ids[side][at[side] : to[side]], number)
            cuts = paired.breaks[:-1]
            inside = cuts[(cuts > at).all(axis=1) & (cuts <= to).all(axis=1)]
            self.positions.append(inside - at - 1 + self.used + self.done * self.length)
            self.tokens += int(to[0] - at[0])
            self.used = [int(used) for used in self.used + to - at]
            at = to
        return True

    def finish(self) -> None:
        """Pad the row in both and begin the next."""
        for side in (0, 1):
            missing = self.length - self.used[side]
            self._write(side, np.full(missing, self.filler[side], dtype=np.int64), -1)
        self.used = [0, 0]
        self.done += 1

    def _write(self, side: int, ids: IntArray, number: int) -> None:
        self.sequences[side].append(ids)
        self.owners[side].append(np.full(len(ids), number, dtype=np.int64))


def pack_pair(
    part: TextPart, student: Tokenizer, teacher: Tokenizer, *, length: int, teacher_vocabulary: int | None
) -> tuple[TokenizedText, TokenizedText, IntArray, IntArray]:
    """Pack a part's documents for both tokenizers into rows that hold the same characters.

    Args:
        part: What to pack, until there are `part.wanted` student tokens.
        student: One tokenizer.
        teacher: The other.
        length: Tokens of a row, for both.
        teacher_vocabulary: Documents with a teacher token at or above this are skipped.

    Returns:
        Student's text, teacher's text, and the flat positions in each that align, (positions,) each.

    Raises:
        BadDataError: Nothing could be packed.
    """
    wanted = math.inf if part.wanted is None else part.wanted
    rows = _Rows(length, (student.end_of_text or 0, teacher.end_of_text or 0))
    used: list[Document] = []
    skipped = 0
    for paired in _paired_documents(part, student, teacher, teacher_vocabulary):
        if rows.tokens >= wanted:
            break
        if paired is None:
            skipped += 1
            continue
        complete = rows.add(paired, len(used), wanted)
        skipped += not complete
        used.append(paired.document)
    if any(rows.used):
        rows.finish()
    if not rows.done:
        raise too_short(rows.tokens, length, skipped)
    texts = [
        part.packed(
            used,
            np.concatenate(rows.sequences[side]).reshape(rows.done, length),
            np.concatenate(rows.owners[side]).reshape(rows.done, length),
            skipped,
        )
        for side in (0, 1)
    ]
    positions = np.concatenate(rows.positions)
    return texts[0], texts[1], positions[:, 0].copy(), positions[:, 1].copy()


def _paired_documents(
    part: TextPart, student: Tokenizer, teacher: Tokenizer, teacher_vocabulary: int | None
) -> Iterator[_PairedDocument | None]:
    """Every document in both tokenisations; None for one with a token the teacher's head has no row for."""
    limited = list(zip(part.documents, part.longest, strict=True))
    for batch in batches(limited, lambda item: len(item[0].text), _ALIGNED_CHARACTERS):
        texts = [document.text for document, _ in batch]
        both = zip(batch, student.encode_spans(texts), teacher.encode_spans(texts), strict=True)
        for (document, longest), student_spans, teacher_spans in both:
            if not fits(teacher_spans.ids, teacher_vocabulary):
                yield None
                continue
            cuts = common_cuts(student_spans, teacher_spans, len(document.text))
            taken = (student_spans.ids, teacher_spans.ids)
            if longest is not None and longest < len(student_spans.ids):
                far_enough = np.flatnonzero(cuts[:, 0] >= longest)
                if len(far_enough):
                    cuts = cuts[: far_enough[0] + 1]
                    taken = (taken[0][: cuts[-1, 0]], taken[1][: cuts[-1, 1]])
            complete = (ended(taken[0], student.end_of_text), ended(taken[1], teacher.end_of_text))
            end = np.asarray([[len(complete[0]), len(complete[1])]], dtype=np.int64)
            yield _PairedDocument(document, complete, np.concatenate([cuts, end]))
