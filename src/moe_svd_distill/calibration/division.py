"""Several named parts from one text, by budgets of tokens, so that no document is in two of them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from moe_svd_distill.calibration.documents import MINIMUM_UNITS, Document, cut_long_documents
from moe_svd_distill.calibration.text import (
    BATCH,
    SHORTEST_SHARE,
    TokenizedText,
    encode_documents,
    even_share,
    fits,
    pack,
    rendered,
    too_short,
    whole,
)
from moe_svd_distill.calibration.tokenizer import IntArray, Tokenizer
from moe_svd_distill.errors import UsageError

SPREADS = (MINIMUM_UNITS, 16, 8, 4, 2, 1)
"""Documents that a part is spread over at least, most wanted first; 16 are enough for error bars."""
ENOUGH_DOCUMENTS = 16
WORTH = 0.8
"""Spreading a part over many documents leaves their tails unused; this share of the tokens must remain for it."""

KEPT = 1 / 8
"""Where text is short, a part that asks for less than this share of the whole keeps this share, up to what it asks."""

_STEPS = 10_000


@dataclass(frozen=True)
class TextPart:
    """The documents of one part.

    Attributes:
        documents: In the order they are packed in, rendered.
        ids: Tokens of each.
        wanted: Tokens to pack, whole sequences.
        asked: Tokens that were asked for; more than `wanted` if there is too little text.
        longest: Tokens to take of one document at most.
        skipped: Documents of the whole text that hold a token one of the two models lacks.
    """

    documents: tuple[Document, ...]
    ids: tuple[IntArray, ...]
    wanted: int
    asked: int
    longest: int
    skipped: int


def divide_text(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    budgets: Mapping[str, int],
    *,
    length: int = 512,
    vocabulary: int | None = None,
    seed: int = 0,
) -> dict[str, TokenizedText]:
    """Draw several parts from one text, each of as many tokens as its budget, no document in two parts.

    Every part is spread over at least 16 documents where that leaves enough text for all (`WORTH`). If there is too
    little text for the budgets, they shrink by one factor, except that a small part keeps an eighth of the whole if it
    asked for that much (`KEPT`): a search over a handful of sequences decides nothing. A part that got less than it
    asked for says so (`TokenizedText.short`). Parts are drawn in the order they are named in, so with enough text none
    depends on the budgets of those after it. The order of documents is drawn from their content and the seed, never
    from file names. With fewer than 24 documents long ones are cut into sections, which then count as documents.

    Args:
        documents: What to read; it is tokenised only as far as needed.
        tokenizer: The student's.
        budgets: Name of the part → tokens, rounded down to whole sequences but never to none; drawn in this order.
        length: Tokens of one sequence, at least 2.
        vocabulary: Documents with a token number at or above this are skipped.
        seed: Of the order of documents.

    Raises:
        UsageError: A budget is not above 0.
        BadDataError: There is less text than one sequence for each part.
    """
    parts = divide(documents, tokenizer, budgets, length=length, vocabulary=vocabulary, seed=seed)
    return {
        name: pack(
            part.documents,
            part.ids,
            tokenizer.end_of_text,
            length=length,
            wanted=part.wanted,
            longest=part.longest,
            skipped=part.skipped,
            asked=part.asked,
        )
        for name, part in parts.items()
    }


def divide(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    budgets: Mapping[str, int],
    *,
    length: int,
    vocabulary: int | None,
    seed: int,
) -> dict[str, TextPart]:
    """Choose the documents of each part, as `divide_text` describes, and leave the packing to the caller."""
    if not budgets or any(tokens <= 0 for tokens in budgets.values()):
        raise UsageError(f"A part of the text has no tokens: {dict(budgets)}", "Give every part a budget above 0")
    full = [whole(tokens, length) for tokens in budgets.values()]
    units = _ordered(documents, tokenizer, len(budgets), seed)
    used: list[Document] = []
    ids: list[IntArray] = []
    skipped = 0
    for begin in range(0, len(units), BATCH):
        for document, encoded in encode_documents(units[begin : begin + BATCH], tokenizer):
            if fits(encoded, vocabulary):
                used.append(document)
                ids.append(encoded)
            else:
                skipped += 1
        if _ends(_lengths(ids), full, SPREADS[0]):
            break
    lengths = _lengths(ids)
    wanted, ends = _best(lengths, full, length, skipped)
    parts = {}
    for name, tokens, begin, end in zip(budgets, wanted, [0, *ends], ends, strict=False):
        parts[name] = TextPart(
            documents=tuple(used[begin:end]),
            ids=tuple(ids[begin:end]),
            wanted=tokens,
            asked=budgets[name],
            longest=even_share(lengths[begin:end], tokens),
            skipped=skipped,
        )
    return parts


def _ordered(documents: Sequence[Document], tokenizer: Tokenizer, parts: int, seed: int) -> list[Document]:
    units: Sequence[Document] = documents
    if len(documents) < MINIMUM_UNITS:
        units = cut_long_documents(
            [rendered(document, tokenizer) for document in documents], minimum=MINIMUM_UNITS * parts
        )
    return sorted(units, key=lambda unit: hashlib.sha256(f"{seed}:{unit.digest}".encode()).digest())


def _lengths(ids: Sequence[IntArray]) -> IntArray:
    return np.asarray([len(part) for part in ids], dtype=np.int64)


def _ends(lengths: IntArray, wanted: Sequence[int], spread: int) -> list[int] | None:
    """Where each part ends if each takes the next documents until it has its tokens; None if they do not suffice.

    No document gives a part more than one `spread`-th of it, so each is over about that many documents.
    """
    ends: list[int] = []
    begin = 0
    for tokens in wanted:
        most = max(ceil(tokens / spread), SHORTEST_SHARE)
        reached = np.cumsum(np.minimum(lengths[begin:], most))
        place = int(np.searchsorted(reached, tokens))
        if place == len(reached):
            return None
        begin += place + 1
        ends.append(begin)
    return ends


def _best(lengths: IntArray, full: Sequence[int], length: int, skipped: int) -> tuple[list[int], list[int]]:
    """Tokens of each part and where it ends: as much of the budgets, over as many documents, as the text allows."""

    def shrunk(step: int) -> list[int]:
        least = int(KEPT * sum(full) * step) // _STEPS
        return [whole(min(tokens, max(tokens * step // _STEPS, least)), length) for tokens in full]

    most: dict[int, int] = {}
    for spread in SPREADS:
        lacking = bisect_right(range(_STEPS + 1), 0, key=lambda step: int(not _ends(lengths, shrunk(step), spread)))
        most[spread] = lacking - 1
    if most[1] < 0:
        raise too_short(int(lengths.sum()), length * len(full), skipped)
    for spread in SPREADS:
        as_good = spread <= ENOUGH_DOCUMENTS or most[spread] == most[ENOUGH_DOCUMENTS]
        if as_good and most[spread] >= WORTH * most[1]:
            wanted = shrunk(most[spread])
            ends = _ends(lengths, wanted, spread)
            if ends:
                return wanted, ends
    raise AssertionError("the last spread is always as good as itself")
