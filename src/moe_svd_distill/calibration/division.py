"""Several named parts from one text, by budgets of tokens, so that no source of text is in two of them.

Documents are read as far as the parts need them: without repeated blocks, tokenised, group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from moe_svd_distill.calibration.allocation import ENOUGH, WIDEST, Spread, allocate, complete
from moe_svd_distill.calibration.documents import MINIMUM_UNITS, Document, Repeats, cut_long_documents, drawing_key
from moe_svd_distill.calibration.text import (
    BATCH,
    Division,
    TextPart,
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

LEAST_APART = 0.4
"""Parts share groups rather than have less than this share of the tokens they could have with shared groups."""

_CHUNK = 1 << 16
"""Characters read of every group before more is read of any: a large one must not be read whole for a small part."""


def divide_text(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    budgets: Mapping[str, int],
    *,
    length: int = 512,
    vocabulary: int | None = None,
    seed: int = 0,
) -> dict[str, TokenizedText]:
    """Draw several parts from one text, each of as many tokens as its budget, no group of documents in two parts.

    Before that, blocks that an earlier document holds are removed (`Repeats`), so that no 30 words in a row are in two
    parts. Every part is spread over at least 16 documents, and over as many groups as there are up to 24, where that
    leaves enough text for all (`allocate`). If there is too little text for the budgets, they shrink by one factor,
    except that a small part keeps an eighth of the whole if it asked for that much: a search over a handful of
    sequences decides nothing. A part that got less than it asked for says so (`TokenizedText.short`). Parts are drawn
    in the order they are named in, so with enough text none depends on the budgets of those after it. The order of
    documents and groups is drawn from their content and the seed, never from names.

    With fewer than 24 documents long ones are cut into sections, which then count as documents of the same group. Where
    there are fewer groups than parts, or dividing by groups leaves the parts less than `LEAST_APART` of what they could
    have, documents are what is kept apart, and `Division.apart` is false.

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
    return {name: pack(part, tokenizer.end_of_text, length) for name, part in parts.items()}


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
    names = list(budgets)
    full = [whole(budgets[name], length) for name in names]
    units = _units(documents, tokenizer, len(names))
    groups = _groups(units, seed)
    apart = len(groups) >= len(names)
    if not apart:
        groups = [[unit] for unit in sorted(units, key=lambda unit: drawing_key(seed, unit.digest))]
    read = _read_groups(groups, tokenizer, full, vocabulary)
    order, numbers = read.by_group()
    lengths = read.lengths[order]
    allocation = allocate(lengths, numbers, full, length)
    if apart and len(groups) < len(units) and (allocation is None or allocation.share < LEAST_APART):
        mixed = np.asarray(sorted(order, key=read.drawn(seed)), dtype=np.int64)
        closer = allocate(read.lengths[mixed], np.arange(len(mixed)), full, length)
        if closer is not None and (allocation is None or allocation.share < LEAST_APART * closer.share):
            apart, order, lengths, allocation = False, mixed, read.lengths[mixed], closer
    if allocation is None:
        raise too_short(int(lengths.sum()), length * len(full), read.skipped)
    division = Division(apart, read.repeats.share, read.repeats.left_out)
    parts = {}
    for name, tokens, places in zip(names, allocation.wanted, allocation.places, strict=True):
        chosen = sorted(order[places], key=read.drawn(seed))
        parts[name] = TextPart(
            documents=tuple(read.documents[place] for place in chosen),
            ids=tuple(read.ids[place] for place in chosen),
            wanted=tokens,
            longest=even_share(lengths[places], tokens),
            asked=budgets[name],
            skipped=read.skipped,
            division=division,
        )
    return parts


def _units(documents: Sequence[Document], tokenizer: Tokenizer, parts: int) -> Sequence[Document]:
    if len(documents) >= MINIMUM_UNITS:
        return documents
    return cut_long_documents([rendered(document, tokenizer) for document in documents], minimum=MINIMUM_UNITS * parts)


def _groups(units: Sequence[Document], seed: int) -> list[list[Document]]:
    """The documents of each group; groups, and documents in them, in the order drawn."""
    found: dict[str, list[Document]] = {}
    for unit in units:
        found.setdefault(unit.group_digest, []).append(unit)

    def drawn(group: list[Document]) -> bytes:
        return drawing_key(seed, " ".join(sorted(unit.digest for unit in group)))

    return [
        sorted(group, key=lambda unit: drawing_key(seed, unit.digest)) for group in sorted(found.values(), key=drawn)
    ]


class _Reading:
    """Documents read so far, in the order they were read; `groups` has the number of each one's group."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int | None, *, repeats_stay: bool) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.repeats, self.repeats_stay = Repeats(), repeats_stay
        self.documents: list[Document] = []
        self.ids: list[IntArray] = []
        self.groups: list[int] = []
        self.skipped = 0

    def read(self, chunk: Sequence[tuple[int, Document]]) -> None:
        """Read documents, each given with the number of its group."""
        fresh = [(group, document if self.repeats_stay else self.repeats.fresh(document)) for group, document in chunk]
        kept = [(group, document) for group, document in fresh if document is not None]
        encoded = encode_documents([document for _, document in kept], self.tokenizer)
        for (group, _), (document, ids) in zip(kept, encoded, strict=True):
            if fits(ids, self.vocabulary):
                self.documents.append(document)
                self.ids.append(ids)
                self.groups.append(group)
            else:
                self.skipped += 1

    @property
    def lengths(self) -> IntArray:
        """Tokens of each document, (documents,)."""
        return np.asarray([len(ids) for ids in self.ids], dtype=np.int64)

    def by_group(self) -> tuple[IntArray, IntArray]:
        """The order that has those of a group side by side, and the number of each one's group, ascending."""
        groups = np.asarray(self.groups, dtype=np.int64)
        order = np.argsort(groups, kind="stable")
        return order, groups[order]

    def drawn(self, seed: int) -> Callable[[int], bytes]:
        """What to sort places by for an order that depends on nothing but content and seed."""
        return lambda place: drawing_key(seed, self.documents[place].digest)

    def suffices(self, full: Sequence[int], spreads: Sequence[Spread]) -> bool:
        """Whether every part can have its tokens over one of these spreads."""
        order, groups = self.by_group()
        return complete(self.lengths[order], groups, full, spreads) is not None


def _read_groups(
    groups: Sequence[Sequence[Document]], tokenizer: Tokenizer, full: Sequence[int], vocabulary: int | None
) -> _Reading:
    """Read groups in their order until every part has its tokens, over as many groups and documents as is wanted.

    Blocks that documents share are removed where there are several parts.
    """
    reading = _Reading(tokenizer, vocabulary, repeats_stay=len(full) == 1)
    for chunks in _rounds(groups):
        for begin in range(0, len(chunks), BATCH):
            reading.read(chunks[begin : begin + BATCH])
            if reading.suffices(full, (WIDEST,)):
                return reading
        if reading.suffices(full, ENOUGH):
            break
    return reading


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
