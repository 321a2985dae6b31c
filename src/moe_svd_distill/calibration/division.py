"""Several named parts from one text, by budgets of tokens, so that no source of text is in two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_svd_distill.calibration.allocation import allocate
from moe_svd_distill.calibration.documents import MINIMUM_UNITS, Document, cut_long_documents, drawing_key
from moe_svd_distill.calibration.gathering import gather
from moe_svd_distill.calibration.text import Division, TokenizedText, even_share, pack, rendered, too_short, whole
from moe_svd_distill.calibration.tokenizer import IntArray, Tokenizer
from moe_svd_distill.errors import UsageError

LEAST_APART = 0.4
"""Parts share groups rather than have less than this share of the tokens they could have with shared groups."""


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
        division: How far it is apart from the others.
    """

    documents: tuple[Document, ...]
    ids: tuple[IntArray, ...]
    wanted: int
    asked: int
    longest: int
    skipped: int
    division: Division


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
            division=part.division,
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
    names = list(budgets)
    full = [whole(budgets[name], length) for name in names]
    units = _units(documents, tokenizer, len(names))
    groups = _groups(units, seed)
    apart = len(groups) >= len(names)
    if not apart:
        groups = [[unit] for unit in sorted(units, key=lambda unit: drawing_key(seed, unit.digest))]
    read = gather(groups, tokenizer, full, vocabulary)
    allocation = allocate(read.lengths, read.groups, full, length)
    if apart and len(groups) < len(units) and (allocation is None or allocation.share < LEAST_APART):
        mixed = read.each_by_itself(seed)
        closer = allocate(mixed.lengths, mixed.groups, full, length)
        if closer is not None and (allocation is None or allocation.share < LEAST_APART * closer.share):
            apart, read, allocation = False, mixed, closer
    if allocation is None:
        raise too_short(int(read.lengths.sum()), length * len(full), read.skipped)
    division = Division(apart, read.removed, read.left_out)
    parts = {}
    for name, tokens, places in zip(names, allocation.wanted, allocation.places, strict=True):
        chosen = sorted(places, key=lambda place: drawing_key(seed, read.documents[place].digest))
        parts[name] = TextPart(
            documents=tuple(read.documents[place] for place in chosen),
            ids=tuple(read.ids[place] for place in chosen),
            wanted=tokens,
            asked=budgets[name],
            longest=even_share(read.lengths[places], tokens),
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
