"""Documents, the sources they belong to, and their sections; by what they are recognised where they come again."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from moe_svd_distill.calibration.chat import Chat

MINIMUM_UNITS = 24
"""With fewer documents than this, long ones are cut into sections before they are divided or counted."""
SHORTEST, LONGEST = 1000, 1 << 16
"""Characters of a section at most, however few documents there are: a document is read no further than it is needed."""


_SPACE = b" \t\n\r\v\f"


@dataclass(frozen=True)
class Portion:
    """What a recipe takes from one place: its name, and which share of the tokens."""

    name: str
    share: float


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    Attributes:
        source: File, or file and line, or data set and row.
        text: What is read. Of a conversation, only what was said, for counting: `Tokenizer.render` makes its text.
        origin: The identity of the whole document if this is a section of one, or of the conversation it was rendered
            from.
        chat: The conversation, as long as no tokenizer has rendered it.
        group: Name of the source it belongs to (a package, a site), which all of its documents share; None if it is
            a source by itself.
        conversation: Whether it is, or was cut from, a conversation.
        portion: What it counts towards where a recipe gives shares; None where it gives none.
    """

    source: str
    text: str
    origin: str | None = None
    chat: Chat | None = None
    group: str | None = None
    conversation: bool = False
    portion: Portion | None = None

    @classmethod
    def of_chat(cls, source: str, chat: Chat, group: str | None = None) -> Document:
        """A conversation that a tokenizer has yet to render."""
        return cls(source, chat.said, chat=chat, group=group, conversation=True)

    @cached_property
    def digest(self) -> str:
        """A name for the content alone, whatever the file is called; what orders are drawn by."""
        content = self.text if self.chat is None else self.chat.content
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def identity(self) -> str:
        """A name for the content but for white space, line ends and spellings in Unicode."""
        content = self.text
        if self.chat is not None:
            content = self.chat.content.replace("\\r", "").replace("\\n", "").replace("\\t", "")
        if not content.isascii():
            content = unicodedata.normalize("NFC", content)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass").translate(None, _SPACE)).hexdigest()

    @property
    def digests(self) -> tuple[str, ...]:
        """What to write down once the document is used, so that `without` recognises it and the whole it is of."""
        return (self.identity,) if self.origin is None else (self.identity, self.origin)

    @property
    def group_digest(self) -> str:
        """A name for the source it belongs to; the identity of the whole document where it is a source by itself."""
        if self.group is None:
            return self.origin or self.identity
        return hashlib.sha256(f"group:{self.group}".encode("utf-8", "surrogatepass")).hexdigest()


def without(documents: Sequence[Document], digests: Collection[str]) -> tuple[Document, ...]:
    """Leave out the documents whose content is already in use elsewhere, named by their `digests`."""
    # Earlier versions wrote down `digest` in place of `identity`.
    return tuple(d for d in documents if d.identity not in digests and d.digest not in digests)


def without_groups(documents: Sequence[Document], digests: Collection[str]) -> tuple[Document, ...]:
    """Leave out the documents of sources already in use elsewhere, named by their `group_digest`."""
    return tuple(document for document in documents if document.group_digest not in digests)


def drawing_key(seed: int, content: str) -> bytes:
    """What to sort by for an order that is random and depends on nothing but content and seed."""
    return hashlib.sha256(f"{seed}:{content}".encode()).digest()


def in_drawn_order(documents: Sequence[Document], seed: int = 0) -> tuple[Document, ...]:
    """Documents in an order drawn from their content and the seed, never from file names; of few, sections of them."""
    return tuple(sorted(cut_long_documents(documents), key=lambda section: drawing_key(seed, section.digest)))


def cut_long_documents(documents: Sequence[Document], minimum: int = MINIMUM_UNITS) -> tuple[Document, ...]:
    """Cut documents into sections of at least `SHORTEST` characters, at line ends, until there are about `minimum`.

    Of enough documents only those that are longer than two sections of `LONGEST` characters are cut. Conversations that
    are not rendered yet come back as they are.
    """
    total = sum(len(document.text) for document in documents)
    size = LONGEST if len(documents) >= minimum else min(max(total // (2 * minimum), SHORTEST), LONGEST)
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
                origin=document.origin or document.identity,
            )
            number += 1
        begin = end
