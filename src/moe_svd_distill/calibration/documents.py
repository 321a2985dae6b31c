"""Reading text from files and folders, and dividing it so that no document serves two purposes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moe_svd_distill.errors import BadDataError, MissingInputError, UsageError

RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TEXT_SUFFIXES = re.compile(
    r"\.(txt|text|md|markdown|rst|tex|html?|xml|csv|tsv|ya?ml|toml|ini|cfg|json|ipynb"
    r"|pyi?|[jt]sx?|c|cc|cpp|h|hpp|cu|java|kt|scala|go|rs|rb|php|swift|m|r|jl|lua|pl|sh|bash|sql|css)"
)

MINIMUM_UNITS = 24
"""With fewer documents than this, long ones are cut into sections before they are divided or counted."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from; `origin` is the digest of the whole document if this is a section of one."""

    source: str
    text: str
    origin: str | None = None

    @cached_property
    def digest(self) -> str:
        """A name for the content alone, so that a copy under another file name is recognised."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def digests(self) -> tuple[str, ...]:
        """What to write down once the document is used, so that `without` recognises it and the whole it is of."""
        return (self.digest,) if self.origin is None else (self.digest, self.origin)


def read_documents(paths: Sequence[str | Path], *, field: str = "text") -> tuple[Document, ...]:
    """Read every document in files and folders; copies of the same text are kept once.

    A folder is searched recursively for files with a text suffix, in the order of their names. A file of JSON
    lines holds one document per line, in `field`; any other file is one document.
    """
    found: dict[str, Document] = {}
    for path in map(Path, paths):
        for file in _files(path):
            for document in _documents(file, field):
                if document.text.strip():
                    found.setdefault(document.digest, document)
    if not found:
        named = ", ".join(map(str, paths)) or "nothing was named"
        raise BadDataError(f"There is no text in {named}", "Name a text file, a JSON-lines file or a folder of them")
    return tuple(found.values())


def without(documents: Sequence[Document], digests: Collection[str]) -> tuple[Document, ...]:
    """Leave out the documents whose content is already in use elsewhere, named by their `digests`."""
    return tuple(document for document in documents if document.digest not in digests)


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
    ordered = sorted(units, key=lambda unit: hashlib.sha256(f"{seed}:{unit.digest}".encode()).digest())
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

    Enough documents come back as they are.
    """
    if len(documents) >= minimum:
        return tuple(documents)
    total = sum(len(document.text) for document in documents)
    size = max(total // (2 * minimum), shortest)
    return tuple(section for document in documents for section in _sections(document, size))


def _sections(document: Document, size: int) -> Iterator[Document]:
    text = document.text
    if len(text) < 2 * size:
        yield document
        return
    begin = number = 0
    while begin < len(text):
        end = len(text) if len(text) - begin < 2 * size else text.rfind("\n", begin + size // 2, begin + size) + 1
        end = end or begin + size
        if text[begin:end].strip():
            yield Document(f"{document.source}#{number}", text[begin:end], document.origin or document.digest)
            number += 1
        begin = end


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            suffix = file.suffix.lower()
            readable = suffix in RECORD_SUFFIXES or TEXT_SUFFIXES.fullmatch(suffix)
            if readable and not hidden and file.is_file():
                yield file
    elif path.exists():
        yield path
    else:
        raise MissingInputError(f"The text {path} does not exist", "Check the path")


def _documents(file: Path, field: str) -> Iterator[Document]:
    text = _read(file)
    if file.suffix.lower() not in RECORD_SUFFIXES:
        yield Document(str(file), text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadDataError(f"{where} is not a line of JSON ({error})", "Mend or remove the line") from error
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            there = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise BadDataError(
                f"{where} has no text in the field {field!r} (found: {there})", "Name the field that holds it"
            )
        yield Document(where, value)


def _read(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{file} is not UTF-8 text (byte {error.start})", "Convert it or leave it out") from error
    except OSError as error:
        raise MissingInputError(
            f"{file} cannot be read ({error.strerror})", "Check the path and its permissions"
        ) from error
    if "\0" in text:
        raise BadDataError(f"{file} is a binary file, not text", "Leave it out, or export it as text or JSON lines")
    return text
