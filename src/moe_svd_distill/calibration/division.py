"""Several named parts from one text, by budgets of tokens, so that no source of text is in two of them.

Documents are read as far as the parts need them: without repeated blocks, tokenised, group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from moe_svd_distill.calibration.allocation import ENOUGH, WIDEST, Spread, allocate, complete
from moe_svd_distill.calibration.documents import (
    LONGEST,
    MINIMUM_UNITS,
    Document,
    Portion,
    cut_long_documents,
    drawing_key,
    without_groups,
)
from moe_svd_distill.calibration.repeats import Repeats
from moe_svd_distill.calibration.text import (
    Division,
    TextPart,
    TokenizedText,
    batches,
    encode_documents,
    even_share,
    fits,
    pack,
    rendered,
    too_short,
    whole,
)
from moe_svd_distill.calibration.tokenizer import IntArray, Tokenizer
from moe_svd_distill.errors import BadDataError, UsageError

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
    parts. Every part is spread over at least 16 documents and 24 groups where that leaves enough text for all; with
    fewer groups the largest part has all that the others do not need (`allocate`). If there is too little text for the
    budgets, they shrink by one factor, except that a small part keeps an eighth of the whole if it asked for that much:
    a search over a handful of sequences decides nothing. A part that got less than it asked for says so
    (`TokenizedText.short`). Parts are drawn in the order they are named in, so with enough text none depends on the
    budgets of those after it. The order of documents and groups is drawn from their content and the seed, never from
    names.

    Where documents count towards portions (`Document.portion`), every part is of their shares, each portion divided by
    itself, without the groups that one before it has given.

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
    portions: dict[Portion | None, list[Document]] = {} if documents else {None: []}
    for document in documents:
        portions.setdefault(document.portion, []).append(document)
    sequences = {name: whole(budgets[name], length) // length for name in budgets}
    shares = [1.0 if portion is None else portion.share for portion in portions]
    divided = {name: divided_by_share(count, shares) for name, count in sequences.items()}
    reading, found = _ReadDocuments(tokenizer, vocabulary, Repeats() if len(budgets) > 1 else None), []
    used: set[str] = set()
    for number, (portion, own) in enumerate(portions.items()):
        full = [divided[name][number] * length for name in budgets]
        left = without_groups(own, used)
        if portion is not None and not left:
            raise BadDataError(
                f"Nothing of {portion.name} is left for its share: the sources before it hold all of its groups",
                "Give it a text of other groups, or name them in another field (text_group)",
            )
        parts = _divide_one(left, reading, full, length, seed)
        used.update(document.group_digest for part in parts for document in part.documents)
        found.append(parts)
    return {
        name: replace(_joined([parts[number] for parts in found], seed), asked=budgets[name])
        for number, name in enumerate(budgets)
    }


def divided_by_share(count: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in these proportions, by largest remainders, with this sum; but none is 0, whatever the sum is."""
    exact = [count * share / sum(shares) for share in shares]
    found = [int(part) for part in exact]
    for place in sorted(range(len(exact)), key=lambda place: found[place] - exact[place])[: count - sum(found)]:
        found[place] += 1
    return [max(part, 1) for part in found]


def _joined(parts: Sequence[TextPart], seed: int) -> TextPart:
    """One part of several portions, in the order their documents are drawn in."""
    if len(parts) == 1:
        return parts[0]
    both = [found for part in parts for found in zip(part.documents, part.ids, part.longest, strict=True)]
    both.sort(key=lambda found: drawing_key(seed, found[0].digest))
    divisions = [part.division for part in parts if part.division is not None]
    return replace(
        parts[-1],
        documents=tuple(document for document, _, _ in both),
        ids=tuple(ids for _, ids, _ in both),
        wanted=sum(part.wanted or 0 for part in parts),
        skipped=sum(part.skipped for part in parts),
        longest=tuple(most for _, _, most in both),
        division=replace(divisions[-1], apart=all(division.apart for division in divisions)),
    )


def _divide_one(
    documents: Sequence[Document], reading: _ReadDocuments, full: Sequence[int], length: int, seed: int
) -> list[TextPart]:
    """The parts of one portion; `reading` knows what those before have read."""
    units = _units(documents, reading.tokenizer, len(full))
    groups = _groups(units, seed)
    apart = len(groups) >= len(full)
    if not apart:
        groups = [[unit] for unit in sorted(units, key=lambda unit: drawing_key(seed, unit.digest))]
    read = _read_groups(groups, reading.anew(), full)
    (order, numbers), repeats = read.by_group(), read.repeats or Repeats()
    lengths = read.lengths[order]
    allocation = allocate(lengths, numbers, full, length)
    if apart and len(groups) < len(units) and (allocation is None or allocation.share < LEAST_APART):
        mixed = np.asarray(sorted(order, key=read.drawn(seed)), dtype=np.int64)
        closer = allocate(read.lengths[mixed], np.arange(len(mixed)), full, length)
        if closer is not None and (allocation is None or allocation.share < LEAST_APART * closer.share):
            apart, order, lengths, allocation = False, mixed, read.lengths[mixed], closer
    if allocation is None:
        raise _indivisible(lengths, len(full), length, read.skipped)
    parts = []
    for tokens, places in zip(allocation.wanted, allocation.places, strict=True):
        chosen = sorted(order[places], key=read.drawn(seed))
        parts.append(
            TextPart(
                documents=tuple(read.documents[place] for place in chosen),
                ids=tuple(read.ids[place] for place in chosen),
                wanted=tokens,
                longest=(even_share(lengths[places], tokens),) * len(chosen),
                asked=None,
                skipped=read.skipped,
                division=Division(apart, repeats.share, repeats.left_out),
            )
        )
    return parts


def _indivisible(lengths: IntArray, parts: int, length: int, skipped: int) -> BadDataError:
    total, least = int(lengths.sum()), length * parts
    if total < least:
        return too_short(total, least, skipped)
    return BadDataError(
        f"The text cannot be divided into {parts} parts that share no document "
        f"(found {len(lengths)} different document(s), the longest {int(lengths.max()):,} of {total:,} tokens)",
        "Give more documents, best of 16 sources or more",
    )


def _units(documents: Sequence[Document], tokenizer: Tokenizer, parts: int) -> Sequence[Document]:
    """Documents, long ones cut into sections: many where there are few, and such as can be read at a time elsewhere."""
    few = len(documents) < MINIMUM_UNITS
    read = [
        rendered(document, tokenizer) if few or (document.chat and len(document.chat.record) > LONGEST) else document
        for document in documents
    ]
    return cut_long_documents(read, minimum=MINIMUM_UNITS * parts if few else MINIMUM_UNITS)


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


class _ReadDocuments:
    """Documents read so far, in that order, each with the number of its group; with no `repeats`, repetitions stay."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int | None, repeats: Repeats | None) -> None:
        self.tokenizer, self.vocabulary, self.repeats, self.skipped = tokenizer, vocabulary, repeats, 0
        self.documents: list[Document] = []
        self.ids: list[IntArray] = []
        self.groups: list[int] = []

    def anew(self) -> _ReadDocuments:
        """One without documents, which knows what repeats in those of this one."""
        return _ReadDocuments(self.tokenizer, self.vocabulary, self.repeats)

    def read(self, chunk: Sequence[tuple[int, Document]]) -> None:
        """Read documents, each given with the number of its group."""
        fresh = [
            (group, self.repeats.fresh(document) if self.repeats is not None else document) for group, document in chunk
        ]
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


def _read_groups(groups: Sequence[Sequence[Document]], reading: _ReadDocuments, full: Sequence[int]) -> _ReadDocuments:
    """Read groups in their order until every part has its tokens, over as many groups and documents as is wanted."""
    for chunks in _rounds(groups):
        for batch in batches(chunks, lambda chunk: len(chunk[1].text)):
            reading.read(batch)
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
