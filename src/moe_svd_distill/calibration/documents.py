"""Documents, the sources they belong to, dividing them so that none serves two purposes, and removing what repeats.

Repeats are blocks of text that other documents hold too: licences, boilerplate, copied functions. Exact runs of words,
as in Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better", whose 50 subword tokens are about 30
words. Words are compared without case, punctuation and white space, so a licence is the same in the comments of any
language and at any width. Similar documents are not looked for: what differs every few words stays.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from moe_svd_distill.calibration.chat import Chat
from moe_svd_distill.errors import BadDataError, UsageError

MINIMUM_UNITS = 24
"""With fewer documents than this, long ones are cut into sections before they are divided or counted."""
WINDOW = 30
"""Words in a row that two documents must share for them to count as a repeated block."""

_LINE = 15
"""A line goes as a whole where a repeated block begins or ends in it, unless so many words of its own stand there."""

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and ideographs: each character counts as a word
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]")

Run = tuple[int, int]
"""Number of the first word, and one past the last."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    Attributes:
        source: File, or file and line, or data set and row.
        text: What is read. Of a conversation, only what was said, for counting: `Tokenizer.render` makes its text.
        origin: The digest of the whole document if this is a section of one, or of the conversation it was rendered
            from.
        chat: The conversation, as long as no tokenizer has rendered it.
        group: Name of the source it belongs to (a package, a site), which all of its documents share; None if it is
            a source by itself.
        conversation: Whether it is, or was cut from, a conversation.
    """

    source: str
    text: str
    origin: str | None = None
    chat: Chat | None = None
    group: str | None = None
    conversation: bool = False

    @classmethod
    def of_chat(cls, source: str, chat: Chat, group: str | None = None) -> Document:
        """A conversation that a tokenizer has yet to render."""
        return cls(source, chat.said, chat=chat, group=group, conversation=True)

    @cached_property
    def digest(self) -> str:
        """A name for the content alone, so that a copy under another file name is recognised."""
        content = self.text if self.chat is None else self.chat.content
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def digests(self) -> tuple[str, ...]:
        """What to write down once the document is used, so that `without` recognises it and the whole it is of."""
        return (self.digest,) if self.origin is None else (self.digest, self.origin)

    @property
    def group_digest(self) -> str:
        """A name for the source it belongs to; the digest of the whole document where it is a source by itself."""
        if self.group is None:
            return self.origin or self.digest
        return hashlib.sha256(f"group:{self.group}".encode("utf-8", "surrogatepass")).hexdigest()


def without(documents: Sequence[Document], digests: Collection[str]) -> tuple[Document, ...]:
    """Leave out the documents whose content is already in use elsewhere, named by their `digests`."""
    return tuple(document for document in documents if document.digest not in digests)


def without_groups(documents: Sequence[Document], digests: Collection[str]) -> tuple[Document, ...]:
    """Leave out the documents of sources already in use elsewhere, named by their `group_digest`."""
    return tuple(document for document in documents if document.group_digest not in digests)


def drawing_key(seed: int, content: str) -> bytes:
    """What to sort by for an order that is random and depends on nothing but content and seed."""
    return hashlib.sha256(f"{seed}:{content}".encode()).digest()


def split_documents(
    documents: Sequence[Document], fractions: Mapping[str, float], seed: int = 0
) -> dict[str, tuple[Document, ...]]:
    """Divide documents into named parts, by shares of the characters, so that no document is in two parts.

    The order is drawn from the content and the seed, never from file names; each part comes back in that order.
    With few documents the long ones are cut into sections first.
    """
    if not fractions or any(share <= 0 for share in fractions.values()):
        raise UsageError(f"A part of the text has no share: {dict(fractions)}", "Give every part a share above 0")
    units = cut_long_documents(documents, minimum=max(MINIMUM_UNITS, len(fractions)))
    if len(units) < len(fractions):
        raise BadDataError(
            f"The text is {len(units)} document(s), too few for {len(fractions)} parts ({', '.join(fractions)})",
            "Give more text",
        )
    ordered = sorted(units, key=lambda unit: drawing_key(seed, unit.digest))
    total_share, total = sum(fractions.values()), sum(len(unit.text) for unit in ordered)
    parts: dict[str, tuple[Document, ...]] = {}
    begin, share_so_far, characters = 0, 0.0, 0
    for index, (name, share) in enumerate(fractions.items()):
        share_so_far += share
        parts_to_come = len(fractions) - index - 1
        end = begin
        while end < len(ordered) - parts_to_come and (
            end == begin or parts_to_come == 0 or characters < total * share_so_far / total_share
        ):
            characters += len(ordered[end].text)
            end += 1
        parts[name] = tuple(ordered[begin:end])
        begin = end
    return parts


def cut_long_documents(
    documents: Sequence[Document], minimum: int = MINIMUM_UNITS, shortest: int = 1000
) -> tuple[Document, ...]:
    """Cut documents into sections of at least `shortest` characters, at line ends, until there are about `minimum`.

    Enough documents come back as they are, and so do conversations that are not rendered yet.
    """
    if len(documents) >= minimum:
        return tuple(documents)
    total = sum(len(document.text) for document in documents)
    size = max(total // (2 * minimum), shortest)
    return tuple(section for document in documents for section in _sections(document, size))


def _sections(document: Document, size: int) -> Iterator[Document]:
    text = document.text
    if len(text) < 2 * size or document.chat is not None:
        yield document
        return
    begin = number = 0
    while begin < len(text):
        end = len(text) if len(text) - begin < 2 * size else text.rfind("\n", begin + size // 2, begin + size) + 1
        end = end or begin + size
        if text[begin:end].strip():
            yield replace(
                document,
                source=f"{document.source}#{number}",
                text=text[begin:end],
                origin=document.origin or document.digest,
            )
            number += 1
        begin = end


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
        self._seen.update(_windows(numbers))
        if text is document.text:
            return document
        return replace(document, text=text, origin=document.origin or document.digest)

    def repeated_share(self, text: str) -> float:
        """Share of a text's words that stand in blocks which have been read; the text itself is not read."""
        _, numbers = self._read(text)
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
