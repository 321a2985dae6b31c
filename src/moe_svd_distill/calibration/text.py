"""Text as the models see it: token sequences of one length, with the document each token belongs to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_svd_distill.calibration.documents import (
    MINIMUM_UNITS,
    Document,
    read_documents,
    split_documents,
    without,
)
from moe_svd_distill.calibration.tokenizer import (
    Tokenizer,
    VocabularyComparison,
    load_tokenizer,
    require_shared_vocabulary,
    vocabularies_match,
)
from moe_svd_distill.errors import BadDataError

__all__ = [
    "Document",
    "TokenizedText",
    "Tokenizer",
    "VocabularyComparison",
    "load_tokenizer",
    "read_documents",
    "require_shared_vocabulary",
    "split_documents",
    "tokenize",
    "vocabularies_match",
    "without",
]

IntArray: TypeAlias = NDArray[np.int64]

FEWEST_DOCUMENTS = 8
_BATCH = 64
_SHORTEST_SHARE = 64


@dataclass(frozen=True)
class TokenizedText:
    """Packed text.

    Attributes:
        sequences: Token ids, (n, length). Documents follow one another, each ended by the end-of-text token.
        document_of_token: Index into `sources` for every token, (n, length).
        sources: Where each document came from.
        digests: What to write down to recognise the same text elsewhere (see `without`).
        skipped: Documents left out because they hold a token that only one of the two models knows.
    """

    sequences: IntArray
    document_of_token: IntArray
    sources: tuple[str, ...]
    digests: tuple[str, ...]
    skipped: int = 0

    @property
    def length(self) -> int:
        """Tokens of one sequence."""
        return int(self.sequences.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return int(self.sequences.size)

    @property
    def predicted(self) -> int:
        """Tokens that have a predecessor in their sequence, which are those that figures are taken over."""
        return int(self.sequences.shape[0]) * (self.length - 1)

    @property
    def unit(self) -> str:
        """What standard errors treat as independent: documents, or sequences where those are too few."""
        return "documents" if len(self.sources) >= FEWEST_DOCUMENTS else "sequences"

    def units(self) -> IntArray:
        """The unit each token counts towards in standard errors, (n, length)."""
        if self.unit == "documents":
            return self.document_of_token
        return np.broadcast_to(np.arange(len(self.sequences))[:, None], self.sequences.shape)


def tokenize(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    limit_tokens: int | None = None,
    *,
    length: int = 512,
    vocabulary: int | None = None,
) -> TokenizedText:
    """Pack documents, in their order, into sequences of `length` tokens; the incomplete last one is dropped.

    Under a limit, long documents are cut short where there are more of them: figures over many documents say more.

    Args:
        documents: What to read; reading stops as soon as the limit is reached.
        tokenizer: The student's.
        limit_tokens: At most this many tokens, rounded down to whole sequences but never to none.
        length: Tokens of one sequence, at least 2.
        vocabulary: Documents with a token number at or above this are skipped (see `VocabularyComparison.shared`).
    """
    wanted = None if limit_tokens is None else max(limit_tokens // length, 1) * length
    share = None if wanted is None else max(wanted // MINIMUM_UNITS, _SHORTEST_SHARE)
    ids: list[IntArray] = []
    used: list[Document] = []
    enough = skipped = 0
    for begin in range(0, len(documents), _BATCH):
        batch = documents[begin : begin + _BATCH]
        for document, encoded in zip(batch, tokenizer.encode([document.text for document in batch]), strict=True):
            if vocabulary is not None and max(encoded, default=0) >= vocabulary:
                skipped += 1
                continue
            ids.append(np.asarray(encoded, dtype=np.int64))
            used.append(document)
            enough += len(encoded) if share is None else min(len(encoded), share)
        if wanted is not None and enough >= wanted:
            break
    if wanted is not None and share is not None:
        longest = max(share, _even_share([len(part) for part in ids], wanted))
        ids = [part[:longest] for part in ids]
    ids = [_ended(part, tokenizer.end_of_text) for part in ids]
    total = sum(len(part) for part in ids)
    count = (total if wanted is None else min(total, wanted)) // length
    if count == 0:
        note = f" ({skipped} documents were skipped for tokens unknown to one of the models)" if skipped else ""
        raise BadDataError(
            f"The text is too short: {total} tokens, one sequence takes {length}{note}", "Give more text"
        )
    owners = np.repeat(np.arange(len(ids)), [len(part) for part in ids])[: count * length]
    last = int(owners[-1]) + 1
    return TokenizedText(
        sequences=np.concatenate(ids)[: count * length].reshape(count, length),
        document_of_token=owners.reshape(count, length),
        sources=tuple(document.source for document in used[:last]),
        digests=tuple(sorted({digest for document in used[:last] for digest in document.digests})),
        skipped=skipped,
    )


def _ended(ids: IntArray, end: int | None) -> IntArray:
    return ids if end is None or (len(ids) and ids[-1] == end) else np.append(ids, end)


def _even_share(lengths: Sequence[int], wanted: int) -> int:
    """The fewest tokens to take of each document at most so that together they are as many as wanted."""
    taken = np.asarray(lengths)
    return bisect_left(range(max(lengths, default=0)), wanted, key=lambda most: int(np.minimum(taken, most).sum()))
