"""Text as the models see it: token sequences of one length, with the document each token belongs to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from moe_svd_distill.calibration.documents import LONGEST, MINIMUM_UNITS, Document, Portion
from moe_svd_distill.calibration.tokenizer import IntArray, Tokenizer
from moe_svd_distill.errors import BadDataError

FEWEST_DOCUMENTS = 8
SHORTEST_SHARE = 64
"""Tokens of a document that are taken at least, however many documents there are."""
BATCH = 64
"""Documents that are read at a time, as long as they have no more than `BATCH_CHARACTERS` together."""
BATCH_CHARACTERS = 1 << 22
_ENCODED_CHARACTERS = 1 << 20
"""Given to a tokenizer at a time, which takes more than a hundred bytes for each while it works."""

T = TypeVar("T")


@dataclass(frozen=True)
class Division:
    """How far the parts of one text are apart.

    Attributes:
        apart: Whether no group is in two parts.
        removed: Share of the words read that was removed, because other documents hold the same block.
        left_out: Documents of which too little remained.
    """

    apart: bool
    removed: float = 0.0
    left_out: int = 0


@dataclass(frozen=True)
class TokenizedText:
    """Packed text.

    Attributes:
        sequences: Token ids, (n, length). Documents follow one another, each ended by the end-of-text token.
        document_of_token: Index into `sources` for every token, (n, length); -1 for padding at the end of a sequence,
            which only the text of a pair with different tokenizers has.
        sources: Where each document came from.
        digests: What to write down to recognise the same text elsewhere (see `without`).
        skipped: Documents left out because they hold a token that only one of the two models knows.
        asked: Tokens that were asked for, or None if all there are.
        groups: Digests of the groups the documents belong to, ascending.
        division: How it was kept apart from other parts of the same text; None if it is no part.
        portions: What each document counts towards; empty where nothing has shares.
    """

    sequences: IntArray
    document_of_token: IntArray
    sources: tuple[str, ...]
    digests: tuple[str, ...]
    skipped: int = 0
    asked: int | None = None
    groups: tuple[str, ...] = ()
    division: Division | None = None
    portions: tuple[Portion, ...] = ()

    def tokens_by_portion(self) -> dict[Portion, int]:
        """Tokens that count towards each portion; empty where nothing has shares."""
        counts = np.bincount(self.document_of_token[self.document_of_token >= 0], minlength=len(self.portions))
        found: dict[Portion, int] = {}
        for portion, count in zip(self.portions, counts, strict=False):
            found[portion] = found.get(portion, 0) + int(count)
        return found

    @property
    def length(self) -> int:
        """Tokens of one sequence."""
        return int(self.sequences.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens in all sequences, padding not counted."""
        return int(np.count_nonzero(self.document_of_token >= 0))

    @property
    def predicted(self) -> int:
        """Tokens that have a predecessor in their sequence, which are those that figures are taken over."""
        return self.tokens - int(self.sequences.shape[0])

    @property
    def short(self) -> bool:
        """Whether there are fewer tokens than were asked for, beyond rounding to whole sequences."""
        return self.asked is not None and self.tokens < self.asked // self.length * self.length

    @property
    def unit(self) -> str:
        """What standard errors treat as independent: documents, or sequences where those are too few."""
        return "documents" if len(self.sources) >= FEWEST_DOCUMENTS else "sequences"

    def units(self) -> IntArray:
        """The unit each token counts towards in standard errors, (n, length)."""
        if self.unit == "documents":
            return self.document_of_token
        return np.broadcast_to(np.arange(len(self.sequences))[:, None], self.sequences.shape)


@dataclass(frozen=True)
class TextPart:
    """Tokenised documents that are to be packed into sequences, one after another.

    Attributes:
        documents: In the order they are packed in, rendered.
        ids: Tokens of each.
        wanted: Tokens to pack, whole sequences; None for all.
        longest: Tokens to take of each at most, the one that ends it not counted; None for all.
        asked: Tokens that were asked for; more than `wanted` if there is too little text.
        skipped: Documents of the whole text that hold a token one of the two models lacks.
        division: How far it is apart from other parts of the same text; None if it is no part.
    """

    documents: tuple[Document, ...]
    ids: tuple[IntArray, ...]
    wanted: int | None
    longest: tuple[int | None, ...]
    asked: int | None
    skipped: int = 0
    division: Division | None = None

    def packed(
        self, used: Sequence[Document], sequences: IntArray, document_of_token: IntArray, skipped: int = 0
    ) -> TokenizedText:
        """Sequences, (n, length), of those of its documents that are used; more of them were skipped meanwhile."""
        return TokenizedText(
            sequences=sequences,
            document_of_token=document_of_token,
            sources=tuple(document.source for document in used),
            digests=tuple(sorted({digest for document in used for digest in document.digests})),
            skipped=self.skipped + skipped,
            asked=self.asked,
            groups=tuple(sorted({document.group_digest for document in used})),
            division=self.division,
            portions=tuple(document.portion for document in used if document.portion is not None),
        )


def tokenize(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    limit_tokens: int | None = None,
    *,
    length: int = 512,
    vocabulary: int | None = None,
) -> TokenizedText:
    """Pack documents, in their order, into sequences of `length` tokens; the incomplete last one is dropped.

    Conversations are rendered by the tokenizer's chat template. Under a limit, long documents are cut short where there
    are more of them: figures over many documents say more.

    Args:
        documents: What to read; reading stops as soon as the limit is reached.
        tokenizer: The student's.
        limit_tokens: At most this many tokens, rounded down to whole sequences but never to none.
        length: Tokens of one sequence, at least 2.
        vocabulary: Documents with a token number at or above this are skipped (see `VocabularyComparison.shared`).
    """
    wanted = None if limit_tokens is None else whole(limit_tokens, length)
    share = None if wanted is None else max(wanted // MINIMUM_UNITS, SHORTEST_SHARE)
    ids: list[IntArray] = []
    used: list[Document] = []
    enough = skipped = 0
    for batch in batches(documents, lambda document: len(document.text)):
        for document, encoded in encode_documents(batch, tokenizer):
            if not fits(encoded, vocabulary):
                skipped += 1
                continue
            ids.append(encoded)
            used.append(document)
            enough += len(encoded) if share is None else min(len(encoded), share)
        if wanted is not None and enough >= wanted:
            break
    longest = None
    if wanted is not None and share is not None:
        longest = max(share, even_share([len(part) for part in ids], wanted))
    part = TextPart(tuple(used), tuple(ids), wanted, (longest,) * len(ids), asked=limit_tokens, skipped=skipped)
    return pack(part, tokenizer.end_of_text, length)


def pack(part: TextPart, end_of_text: int | None, length: int) -> TokenizedText:
    """Put tokenised documents one after another, each ended, into sequences of `length` tokens.

    Args:
        part: The documents and how much of them to take.
        end_of_text: What ends each, if anything.
        length: Tokens of one sequence.

    Raises:
        BadDataError: There is not even one sequence.
    """
    parts = [ended(ids[:most], end_of_text) for ids, most in zip(part.ids, part.longest, strict=True)]
    total = sum(len(ids) for ids in parts)
    count = (total if part.wanted is None else min(total, part.wanted)) // length
    if count == 0:
        raise too_short(total, length, part.skipped)
    owners = np.repeat(np.arange(len(parts)), [len(ids) for ids in parts])[: count * length]
    used = part.documents[: int(owners[-1]) + 1]
    sequences = np.concatenate(parts)[: count * length].reshape(count, length)
    return part.packed(used, sequences, owners.reshape(count, length))


def batches(items: Sequence[T], characters: Callable[[T], int], most: int = BATCH_CHARACTERS) -> Iterator[list[T]]:
    """At most `BATCH` items at a time, of at most so many characters together; a longer one comes alone."""
    batch: list[T] = []
    left = most
    for item in items:
        if batch and (len(batch) == BATCH or characters(item) > left):
            yield batch
            batch, left = [], most
        batch.append(item)
        left -= characters(item)
    if batch:
        yield batch


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> list[tuple[Document, IntArray]]:
    """Render what are conversations, and tokenise; each document comes back as the text that was read.

    Of a text that nobody has cut into sections, the beginning is read.
    """
    encoded = []
    read = [_beginning(rendered(document, tokenizer)) for document in documents]
    for batch in batches(read, lambda document: len(document.text), _ENCODED_CHARACTERS):
        ids = tokenizer.encode([document.text for document in batch])
        encoded += [(document, np.asarray(found, dtype=np.int64)) for document, found in zip(batch, ids, strict=True)]
    return encoded


def _beginning(document: Document) -> Document:
    return document if len(document.text) <= 2 * LONGEST else replace(document, text=document.text[: 2 * LONGEST])


def rendered(document: Document, tokenizer: Tokenizer) -> Document:
    """The document as text: a conversation as the tokenizer's chat template writes it, anything else as it is.

    The conversation's own identity stays with it as `origin`, so it is recognised whichever template it went through.
    """
    if document.chat is None:
        return document
    text = tokenizer.render(document.chat, document.source)
    return replace(document, text=text, origin=document.identity, chat=None)


def fits(ids: IntArray, vocabulary: int | None) -> bool:
    """Whether every token is below `vocabulary`."""
    return vocabulary is None or int(ids.max(initial=0)) < vocabulary


def ended(ids: IntArray, end: int | None) -> IntArray:
    """The tokens with the end-of-text token after them, unless it is there."""
    return ids if end is None or (len(ids) and ids[-1] == end) else np.append(ids, end)


def whole(tokens: int, length: int) -> int:
    """Tokens rounded down to whole sequences, but never to none."""
    return max(tokens // length, 1) * length


def even_share(lengths: Sequence[int] | IntArray, wanted: int) -> int:
    """The fewest tokens to take of each document at most so that together they are as many as wanted."""
    taken = np.asarray(lengths, dtype=np.int64)
    longest = int(taken.max(initial=0))
    return bisect_left(range(longest), wanted, key=lambda most: int(np.minimum(taken, most).sum()))


def too_short(total: int, least: int, skipped: int) -> BadDataError:
    """The refusal of text that does not fill one sequence of each part."""
    note = f" ({skipped} documents were skipped for tokens unknown to one of the models)" if skipped else ""
    return BadDataError(
        f"The text is too short: found {total:,} tokens, expected at least {least:,}, one sequence of each part{note}",
        "Give more text: 16 sources and 16,384 tokens or more judge well",
    )
