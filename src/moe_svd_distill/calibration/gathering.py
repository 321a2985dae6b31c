"""Reading documents as far as the parts of a text need them: without repeated blocks, tokenised, group by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_svd_distill.calibration.allocation import ENOUGH, WIDEST, Spread, complete
from moe_svd_distill.calibration.documents import Document, drawing_key
from moe_svd_distill.calibration.repeats import Repeats
from moe_svd_distill.calibration.text import BATCH, encode_documents, fits
from moe_svd_distill.calibration.tokenizer import IntArray, Tokenizer

_CHUNK = 1 << 16
"""Characters read of every group before more is read of any: a large one must not be read whole for a small part."""


@dataclass(frozen=True)
class Gathered:
    """What was read.

    Attributes:
        documents: Those of a group side by side.
        ids: Tokens of each.
        groups: Number of the group of each, (documents,), ascending.
        skipped: Documents that hold a token one of the two models lacks.
        removed: Share of the words that was removed as repetitions.
        left_out: Documents of which too little remained.
    """

    documents: tuple[Document, ...]
    ids: tuple[IntArray, ...]
    groups: IntArray
    skipped: int
    removed: float
    left_out: int

    @property
    def lengths(self) -> IntArray:
        """Tokens of each document, (documents,)."""
        return _lengths(self.ids)

    def each_by_itself(self, seed: int) -> Gathered:
        """The same documents, each a group by itself, in the order drawn."""
        order = sorted(range(len(self.ids)), key=lambda place: drawing_key(seed, self.documents[place].digest))
        return replace(
            self,
            documents=tuple(self.documents[place] for place in order),
            ids=tuple(self.ids[place] for place in order),
            groups=np.arange(len(order)),
        )


def gather(
    groups: Sequence[Sequence[Document]], tokenizer: Tokenizer, full: Sequence[int], vocabulary: int | None
) -> Gathered:
    """Read groups in their order until every part has its tokens, over as many groups and documents as is wanted.

    Args:
        groups: Documents by group.
        tokenizer: The student's.
        full: Tokens of each part, ascending; blocks that documents share are removed where there are several parts.
        vocabulary: Documents with a token number at or above this are skipped.
    """
    reading = _Reading(tokenizer, vocabulary, Repeats() if len(full) > 1 else None)
    for chunks in _rounds(groups):
        for begin in range(0, len(chunks), BATCH):
            reading.read(chunks[begin : begin + BATCH])
            if reading.suffices(full, (WIDEST,)):
                return reading.result()
        if reading.suffices(full, ENOUGH):
            break
    return reading.result()


class _Reading:
    """Documents read so far, in the order they were read."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int | None, repeats: Repeats | None) -> None:
        self.tokenizer, self.vocabulary, self.repeats = tokenizer, vocabulary, repeats
        self.documents: list[Document] = []
        self.ids: list[IntArray] = []
        self.groups: list[int] = []
        self.skipped = 0

    def read(self, chunk: Sequence[tuple[int, Document]]) -> None:
        """Read documents, each given with the number of its group."""
        fresh = [(group, self.repeats.fresh(document) if self.repeats else document) for group, document in chunk]
        kept = [(group, document) for group, document in fresh if document is not None]
        encoded = encode_documents([document for _, document in kept], self.tokenizer)
        for (group, _), (document, ids) in zip(kept, encoded, strict=True):
            if fits(ids, self.vocabulary):
                self.documents.append(document)
                self.ids.append(ids)
                self.groups.append(group)
            else:
                self.skipped += 1

    def suffices(self, full: Sequence[int], spreads: Sequence[Spread]) -> bool:
        """Whether every part can have its tokens over one of these spreads."""
        order, groups = self._by_group()
        return complete(_lengths(self.ids)[order], groups, full, spreads) is not None

    def result(self) -> Gathered:
        """Everything read, group by group."""
        order, groups = self._by_group()
        return Gathered(
            tuple(self.documents[place] for place in order),
            tuple(self.ids[place] for place in order),
            groups,
            self.skipped,
            self.repeats.share if self.repeats else 0.0,
            self.repeats.left_out if self.repeats else 0,
        )

    def _by_group(self) -> tuple[IntArray, IntArray]:
        groups = np.asarray(self.groups, dtype=np.int64)
        order = np.argsort(groups, kind="stable")
        return order, groups[order]


def _rounds(groups: Sequence[Sequence[Document]]) -> Iterator[list[tuple[int, Document]]]:
    """The next characters of every group, again and again, until all have been read."""
    left = {number: iter(group) for number, group in enumerate(groups)}
    while left:
        chunks: list[tuple[int, Document]] = []
        for number, documents in list(left.items()):
            characters = 0
            for document in documents:
                chunks.append((number, document))
                characters += len(document.text)
                if characters >= _CHUNK:
                    break
            else:
                del left[number]
        yield chunks


def _lengths(ids: Sequence[IntArray]) -> IntArray:
    return np.asarray([len(part) for part in ids], dtype=np.int64)
