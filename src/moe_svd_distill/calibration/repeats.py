"""Removing what repeats: blocks of text that other documents hold too, such as licences, boilerplate, copied functions.

Exact runs of words, as in Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better", whose 50 subword
tokens are about 30 words. Words are compared without case, punctuation and white space, so a licence is the same in the
comments of any language and at any width. Similar documents are not looked for: what differs every few words stays.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moe_svd_distill.calibration.documents import Document

WINDOW = 30
"""Words in a row that two documents must share for them to count as a repeated block."""

_LINE = 15
"""A line goes as a whole where a repeated block begins or ends in it, unless so many words of its own stand there."""

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and ideographs: each character counts as a word
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]")

Run = tuple[int, int]
"""Number of the first word, and one past the last."""


@dataclass
class Repeats:
    """The text that has been read so far, as hashes of its windows; about 75 bytes a word.

    Attributes:
        words: Read, of all documents.
        removed: Words removed of these, those of documents left out among them.
        left_out: Documents of which too little remained.
    """

    words: int = 0
    removed: int = 0
    left_out: int = 0
    _numbers: dict[str, int] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)

    @property
    def share(self) -> float:
        """Share of the words that was removed."""
        return self.removed / self.words if self.words else 0.0

    def fresh(self, document: Document) -> Document | None:
        """Read one more document: what no earlier document holds of it, cut at line ends where possible.

        Of what comes back no window is in the text of a document that came back before. Conversations are an exception:
        they come back whole, or not at all if most of their words are repeated. Repetitions inside a document stay.

        Returns:
            The document itself if nothing is repeated; None if less than a window remains of one that was cut.
        """
        text = document.text
        spans, numbers = self._read(text)
        total = len(numbers)
        self.words += total
        while runs := self._repeated(numbers):
            if document.conversation:
                if 2 * sum(last - first for first, last in runs) > total:
                    self._leave_out(total)
                    return None
                break
            text = without_runs(text, spans, runs)
            spans, numbers = self._read(text)  # again: what is joined by the cut may be a repetition in turn
        if len(numbers) < min(total, WINDOW):
            self._leave_out(total)
            return None
        self.removed += total - len(numbers)
        self._seen.update(_windows(numbers) or [hash(tuple(numbers))])
        if text is document.text:
            return document
        return replace(document, text=text, origin=document.origin or document.identity)

    def repeated_share(self, text: str) -> float:
        """Share of a text's words that stand in blocks which have been read; the text itself is not read.

        One shorter than a window counts if a whole text of the same words has been read.
        """
        _, numbers = self._read(text)
        if len(numbers) < WINDOW:
            return float(bool(numbers) and hash(tuple(numbers)) in self._seen)
        return sum(last - first for first, last in self._repeated(numbers)) / max(len(numbers), 1)

    def _leave_out(self, words: int) -> None:
        self.removed += words
        self.left_out += 1

    def _read(self, text: str) -> tuple[list[Run], list[int]]:
        """Where the words are, and one number for each different one."""
        spans, numbers = [], []
        for found in _WORD.finditer(text):
            spans.append(found.span())
            numbers.append(self._numbers.setdefault(found[0].lower(), len(self._numbers)))
        return spans, numbers

    def _repeated(self, numbers: Sequence[int]) -> list[Run]:
        runs: list[Run] = []
        for first, window in enumerate(_windows(numbers)):
            if window in self._seen:
                if runs and first <= runs[-1][1]:
                    runs[-1] = (runs[-1][0], first + WINDOW)
                else:
                    runs.append((first, first + WINDOW))
        return runs


def _windows(numbers: Sequence[int]) -> list[int]:
    return [hash(window) for window in zip(*(numbers[place:] for place in range(WINDOW)), strict=False)]


def without_runs(text: str, spans: Sequence[Run], runs: Sequence[Run]) -> str:
    """Cut runs of words out of a text, and the rest of the lines they begin and end in if that is little.

    Args:
        text: The text.
        spans: First character of each word and one past its last, ascending.
        runs: Words to cut, ascending, not overlapping.
    """
    begins = [begin for begin, _ in spans]
    kept: list[str] = []
    at = 0
    for first, last in runs:
        begin, end = spans[first][0], spans[last - 1][1]
        line, stop = text.rfind("\n", 0, begin) + 1, text.find("\n", end) + 1 or len(text)
        whole = first - bisect_left(begins, line) < _LINE
        kept.append(text[at : max(at, line)] if whole else text[at : max(at, begin)] + " ")
        at = max(at, stop if bisect_left(begins, stop) - last < _LINE else end)
    return "".join((*kept, text[at:]))
