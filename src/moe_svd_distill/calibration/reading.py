"""Reading documents: from files of text or of records, folders, and data sets of the hub.

However much there is, no more stays in memory than is asked for: of more text, documents are drawn by their content.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_svd_distill.calibration.dataset_rows import DATASET_PREFIX, dataset_rows, parse_dataset
from moe_svd_distill.calibration.documents import Document, drawing_key
from moe_svd_distill.calibration.record_files import (
    RECORD_SUFFIXES,
    Row,
    is_parquet,
    parquet_rows,
    rows,
    text_of,
    unreadable,
)
from moe_svd_distill.calibration.records import document_of_record
from moe_svd_distill.errors import BadDataError, MissingInputError

TEXT_SUFFIXES = re.compile(
    r"\.(txt|text|md|markdown|rst|tex|html?|xml|csv|tsv|ya?ml|toml|ini|cfg|json|ipynb"
    r"|pyi?|[jt]sx?|c|cc|cpp|h|hpp|cu|java|kt|scala|go|rs|rb|php|swift|m|r|jl|lua|pl|sh|bash|sql|css)"
)
ENOUGH_CHARACTERS = 50_000_000
"""Kept of a text at least, if it has them: about 12 million tokens, more than any preset asks for."""

_LONGEST = 1 << 24  # kept of one document at least, if it has them
_CHARACTERS_PER_TOKEN = 16  # several times what any text has, so that there is something to choose from
_EVERYTHING = 1 << 62
_REPLACEMENT = "\ufffd"
_NAMED = 3  # files that are left out
_SLACK = 1.25  # by how much more is held than kept before documents are dropped


@dataclass(frozen=True)
class ReadText:
    """Documents and what became of the others.

    Attributes:
        documents: In the order they were read.
        counts: For run.json: characters kept, and documents by what became of them.
        notes: What people should know.
    """

    documents: tuple[Document, ...]
    counts: dict[str, int]
    notes: tuple[str, ...]


def enough_characters(tokens: int | None) -> int:
    """How many characters to keep of a text for so many tokens; None for all of it."""
    return _EVERYTHING if tokens is None else max(ENOUGH_CHARACTERS, _CHARACTERS_PER_TOKEN * tokens)


def read_text(
    paths: Sequence[str | Path],
    *,
    field: str | None = None,
    group_field: str | None = None,
    limit_characters: int = ENOUGH_CHARACTERS,
) -> ReadText:
    """Read the documents in files, folders and data sets; the same text is kept once, whatever its white space.

    JSON lines, JSON arrays, CSV and parquet hold one document per record: a text or a conversation (see
    `document_of_record`); any other file is one document. A folder is searched recursively for files with a text or
    record suffix, in the order of their names; JSON and CSV there whose first record is of no known form are read as
    plain text, and a note says so. `datasets:NAME[:CONFIG][:SPLIT][#FIELD]` names a data set of the hub (see
    `parse_dataset`).

    Every document knows its group, the source it belongs to: a record says so in a field; text files of a folder with
    several sub-folders of text belong to the first-level sub-folder they are in, by its name; anything else is a source
    by itself.

    Args:
        paths: Files, folders, and names of data sets.
        field: The field of a record that holds its text or its messages; default: see `document_of_record`.
        group_field: The field of a record that names the source it belongs to (see `document_of_record`).
        limit_characters: Characters to keep at about most. Of more, documents are drawn by their content, so that
            neither names nor order matter; a document that is much of it is cut, and a data set is read no further.

    Raises:
        MissingInputError: A file or a data set is not there.
        BadDataError: A file is not text, a record holds neither text nor messages, or there is no text at all.
        UsageError: The name of a data set is not one, or an optional package is missing.
    """
    reading, sample = _Reader(field, group_field, limit_characters), _Sample(limit_characters)
    for path in paths:
        for document in reading.documents(path):
            sample.add(document)
    found = sample.drawn()
    if not found:
        named = ", ".join(map(str, paths)) or "nothing was named"
        raise BadDataError(f"There is no text in {named}", "Name a text file, a JSON-lines file or a folder of them")
    return ReadText(found, sample.counts(found), (*reading.notes(), *sample.notes()))


def refuse_missing(paths: Sequence[str | Path]) -> None:
    """Look for files and folders without reading them; names of data sets are left alone.

    Raises:
        MissingInputError: One is not there.
    """
    for path in paths:
        if not str(path).startswith(DATASET_PREFIX) and not Path(path).exists():
            raise _missing(Path(path))


def _missing(path: Path) -> MissingInputError:
    return MissingInputError(f"The text {path} does not exist", "Check the path")


class _Sample:
    """As much text as is wanted; of more, the documents that come first in an order drawn from their content."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[str, Document] = {}
        self._characters = 0
        self._border: bytes | None = None
        self._left_out: Counter[str] = Counter()
        self._read = 0

    def add(self, document: Document) -> None:
        size = len(document.text)
        self._read += size
        if not size or document.text.isspace():
            self._left_out["empty"] += 1
        elif document.identity in self._kept:
            self._left_out["copies"] += 1
        elif self._border is not None and _place(document) >= self._border:
            self._left_out["not_drawn"] += 1
        else:
            self._kept[document.identity] = document
            self._characters += size
            if self._characters > _SLACK * self._limit:
                self._drop()

    def drawn(self) -> tuple[Document, ...]:
        if self._characters > self._limit:
            self._drop()
        return tuple(self._kept.values())

    def counts(self, found: Sequence[Document]) -> dict[str, int]:
        return {
            "documents": len(found),
            "characters": sum(len(document.text) for document in found),
            **{name: self._left_out[name] for name in ("empty", "copies", "not_drawn")},
        }

    def notes(self) -> Iterator[str]:
        if self._left_out["not_drawn"]:
            yield (
                f"{self._characters:,} of {self._read:,} characters are used, drawn by content; "
                "that is enough for the tokens asked for"
            )
        for count, what in (("empty", "without text"), ("copies", "the same as others but for white space")):
            if self._left_out[count]:
                yield f"{_so_many(self._left_out[count], f'document {what} was', f'documents {what} were')} left out"
        lost = sum(_REPLACEMENT in document.text for document in self._kept.values())
        if lost:
            yield (
                f"{_so_many(lost, 'document holds', 'documents hold')} U+FFFD in place of what is no character "
                "(lone surrogates and the like)"
            )

    def _drop(self) -> None:
        characters, kept = 0, set()
        for document in sorted(self._kept.values(), key=_place):
            if characters >= self._limit:
                self._border = min(_place(document), self._border or b"\xff" * 32)
                break
            characters += len(document.text)
            kept.add(document.identity)
        self._left_out["not_drawn"] += len(self._kept) - len(kept)
        self._kept = {name: document for name, document in self._kept.items() if name in kept}
        self._characters = characters


def _place(document: Document) -> bytes:
    return drawing_key(0, document.identity)


class _Reader:
    """Documents of paths, one after another, and what was read otherwise than its name says."""

    def __init__(self, field: str | None, group_field: str | None, limit: int) -> None:
        self._field, self._group_field, self._limit = field, group_field, limit
        self._longest = limit if limit == _EVERYTHING else min(limit, max(_LONGEST, limit // 3))
        self._as_text: list[Path] = []
        self._left_out: list[Path] = []
        self._cut: dict[str, int] = {}

    def documents(self, path: str | Path) -> Iterator[Document]:
        if str(path).startswith(DATASET_PREFIX):
            yield from self._of_dataset(str(path))
            return
        found, others = _files(Path(path))
        self._left_out += others
        for file, folder in found:
            if self._holds_records(file, named=file == Path(path)):
                yield from self._of_records(file, rows(file, self._longest))
            else:
                yield from self._of_text(file, folder)

    def notes(self) -> Iterator[str]:
        if self._as_text:
            one = "file of JSON or CSV holds no records of a known form and was"
            more = "files of JSON or CSV hold no records of a known form and were"
            yield f"{_so_many(len(self._as_text), one, more)} read as plain text (the first: {self._as_text[0]})"
        if self._left_out:
            one, more = "file is not text by its name and was", "files are not text by their names and were"
            first = ", ".join(map(str, self._left_out[:_NAMED]))
            yield f"{_so_many(len(self._left_out), one, more)} left out (the first: {first})"
        for where, characters in self._cut.items():
            yield f"only about the first {characters:,} characters of {where} were read"

    def _of_records(self, file: Path, found: Iterator[Row]) -> Iterator[Document]:
        for row in found:
            where = f"{file}:{row.number}"
            if row.cut:
                self._cut[where] = self._longest
            yield self._of_record(row.record, where, self._field)

    def _of_record(self, record: object, where: str, field: str | None) -> Document:
        return document_of_record(record, where, field, group_field=self._group_field)

    def _of_text(self, file: Path, folder: str | None) -> Iterator[Document]:
        try:
            with file.open("rb") as stream:  # once: it may be a pipe
                if is_parquet(file, stream):
                    yield from self._of_records(file, parquet_rows(file))
                    return
                content = stream.read(self._longest if self._longest < _EVERYTHING else -1)
                cut = bool(stream.read(1))
        except OSError as error:
            raise unreadable(file, error) from error
        if cut:
            self._cut[str(file)] = self._longest
        yield Document(str(file), text_of(file, content, cut=cut), group=folder)

    def _of_dataset(self, source: str) -> Iterator[Document]:
        """A data set's rows in its order, until the limit is reached; a field that the source names goes first."""
        named = parse_dataset(source)
        characters = 0
        for number, row in enumerate(dataset_rows(source, named), start=1):
            document = self._of_record(row, f"{source}:{number}", named.field or self._field)
            yield document
            characters += len(document.text)
            if characters >= self._limit:
                self._cut[source] = self._limit
                return

    def _holds_records(self, file: Path, *, named: bool) -> bool:
        suffix = file.suffix.lower()
        if suffix not in RECORD_SUFFIXES:
            return False
        if named or not TEXT_SUFFIXES.fullmatch(suffix):
            return True
        try:
            first = next(rows(file, self._longest), None)
            if first is not None:
                self._of_record(first.record, str(file), self._field)
        except BadDataError:
            first = None
        if first is None:
            self._as_text.append(file)
        return first is not None


def _files(path: Path) -> tuple[list[tuple[Path, str | None]], list[Path]]:
    """Files to read, each with the sub-folder it is in where the given folder has several; those that are no text."""
    if not path.exists():
        raise _missing(path)
    if not path.is_dir():
        return [(path, None)], []
    files = sorted(file for file in path.rglob("*") if file.is_file())
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    found = [file for file in visible if _may_be_text(file)]
    inside = {file: parts[0] for file in found if len(parts := file.relative_to(path).parts) > 1}
    several = len(set(inside.values())) > 1
    named = [(file, inside.get(file) if several else None) for file in found]
    return named, [file.relative_to(path) for file in visible if not _may_be_text(file)]


def _may_be_text(file: Path) -> bool:
    suffix = file.suffix.lower()
    return bool(suffix in RECORD_SUFFIXES or TEXT_SUFFIXES.fullmatch(suffix))


def _so_many(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"
