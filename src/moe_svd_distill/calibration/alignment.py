"""Where two tokenisations of one text have read exactly the same characters."""

from __future__ import annotations

import numpy as np

from moe_svd_distill.calibration.tokenizer import IntArray, TokenSpans


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
    _, mine, other = np.intersect1d(student_read, teacher_read, assume_unique=True, return_indices=True)
    return np.stack([student_tokens[mine], teacher_tokens[other]], axis=1).astype(np.int64)
