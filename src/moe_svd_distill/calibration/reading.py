"""Reading documents: from files, folders, and data sets of the hub (streamed, by the optional package `datasets`)."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_svd_distill.calibration.chat import as_chat
from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.errors import BadDataError, MissingInputError, RemoteError, UsageError, reason_of

FIELDS = ("text", "messages", "conversations")
"""Where a record's content is looked for unless a field is named, in this order."""

GROUP_FIELDS = ("group", "repo", "repository", "repo_name", "package", "conversation_id")
"""Where the source a record belongs to is looked for unless a field is named, in this order."""

RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TEXT_SUFFIXES = re.compile(
    r"\.(txt|text|md|markdown|rst|tex|html?|xml|csv|tsv|ya?ml|toml|ini|cfg|json|ipynb"
    r"|pyi?|[jt]sx?|c|cc|cpp|h|hpp|cu|java|kt|scala|go|rs|rb|php|swift|m|r|jl|lua|pl|sh|bash|sql|css)"
)

DATASET_PREFIX = "datasets:"
DATASET_CHARACTERS = 50_000_000
"""Read of each data set at most unless told otherwise: about 12 million tokens, more than any preset asks for."""

_OLDEST = 4  # the first major version that runs no code from a data set's repository
_FORM = "Write datasets:NAME[:CONFIG][:SPLIT][#FIELD], for example datasets:org/name::train#text"


def read_documents(
    paths: Sequence[str | Path],
    *,
    field: str | None = None,
    group_field: str | None = None,
    limit_characters: int = DATASET_CHARACTERS,
) -> tuple[Document, ...]:
    """Read every document in files, folders and data sets; copies of the same text are kept once.

    A folder is searched recursively for files with a text suffix, in the order of their names. A file of JSON lines
    holds one document per line: a text or a conversation (see `document_of_record`); any other file is one document.
    `datasets:NAME[:CONFIG][:SPLIT][#FIELD]` names a data set of the hub (see `parse_dataset`).

    Every document knows its group, the source it belongs to: a record says so in a field; text files of a folder with
    several sub-folders of text belong to the first-level sub-folder they are in, by its name; anything else is a source
    by itself.

    Args:
        paths: Files, folders, and names of data sets.
        field: The field of a record that holds its text or its messages; default: `text`, else `messages`, else
            `conversations`.
        group_field: The field of a record that names the source it belongs to (see `document_of_record`).
        limit_characters: Characters to stream of each data set at most, from its beginning. Files are read whole.

    Raises:
        MissingInputError: A file or a data set is not there.
        BadDataError: A file is not text, a record holds neither text nor messages, or there is no text at all.
        UsageError: The name of a data set is not one, or the package `datasets` is missing.
    """
    found: dict[str, Document] = {}
    for path in paths:
        for document in _source(path, field, group_field, limit_characters):
            if document.text.strip():
                found.setdefault(document.digest, document)
    if not found:
        named = ", ".join(map(str, paths)) or "nothing was named"
        raise BadDataError(f"There is no text in {named}", "Name a text file, a JSON-lines file or a folder of them")
    return tuple(found.values())


def document_of_record(
    record: Any, where: str, field: str | None = None, *, group_field: str | None = None
) -> Document:
    """Read a text, or a list of messages in the `role`/`content` or the ShareGPT form.

    Args:
        record: The record's fields.
        where: File and line, or data set and row; becomes the document's source.
        field: The one field to look in; default: the first of `FIELDS` that is there and not null.
        group_field: The one field that names the source the record belongs to, a string or a number; default: the
            first of `GROUP_FIELDS` that holds one. A record without is a source by itself.

    Raises:
        BadDataError: The record holds neither.
    """
    if not isinstance(record, Mapping):
        raise BadDataError(f"{where} is not a record (found: {type(record).__name__})", "Write one JSON object a line")
    for name in FIELDS if field is None else (field,):
        value = record.get(name)
        if isinstance(value, str):
            return Document(where, value, group=_group(record, where, group_field))
        if value is None or (field is None and not isinstance(value, list)):
            continue
        try:
            return Document.of_chat(where, as_chat(value, record), _group(record, where, group_field))
        except ValueError as error:
            raise BadDataError(
                f"{where} has no text in the field {name!r}, and no conversation either: {error}",
                "Mend or remove the record, or name the field that holds its text",
            ) from error
    looked = repr(field) if field is not None else f"{FIELDS[0]!r} and no messages in {' or '.join(FIELDS[1:])}"
    there = ", ".join(sorted(map(str, record))) or "nothing"
    raise BadDataError(f"{where} has no text in the field {looked} (found: {there})", "Name the field that holds it")


@dataclass(frozen=True)
class DatasetName:
    """What `datasets:NAME[@REVISION][:CONFIG][:SPLIT][#FIELD]` names.

    Attributes:
        name: Repository on the hub, or a local folder of data files.
        config: Configuration (subset) or None for the only one.
        split: Which part, `train` unless given.
        field: Field of a row that holds its text or messages, or None to look for it.
        revision: Commit, tag or branch on the hub, or None.
    """

    name: str
    config: str | None = None
    split: str = "train"
    field: str | None = None
    revision: str | None = None


def parse_dataset(source: str) -> DatasetName:
    """Read `datasets:NAME[@REVISION][:CONFIG][:SPLIT][#FIELD]`; an empty place is the default (`NAME::validation`).

    Raises:
        UsageError: It is not of that form.
    """
    rest, _, field = source.removeprefix(DATASET_PREFIX).partition("#")
    places = rest.split(":")
    name, _, revision = places[0].partition("@")
    if not source.startswith(DATASET_PREFIX) or not name or len(places) > 3:
        raise UsageError(f"{source!r} does not name a data set", _FORM)
    config, split = (*places[1:], "", "")[:2]
    return DatasetName(name, config or None, split or "train", field or None, revision or None)


def _source(path: str | Path, field: str | None, group_field: str | None, limit_characters: int) -> Iterator[Document]:
    if str(path).startswith(DATASET_PREFIX):
        yield from _dataset_documents(str(path), field, group_field, limit_characters)
        return
    for file, folder in _files(Path(path)):
        if file.suffix.lower() in RECORD_SUFFIXES:
            yield from _records(file, field, group_field)
        else:
            yield Document(str(file), _read(file), group=folder)


def _files(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Files to read, each with the sub-folder it is in where the given folder has several."""
    if not path.exists():
        raise MissingInputError(f"The text {path} does not exist", "Check the path")
    if not path.is_dir():
        yield path, None
        return
    found = [file for file in sorted(path.rglob("*")) if _readable(file, path)]
    inside = {file: parts[0] for file in found if len(parts := file.relative_to(path).parts) > 1}
    several = len(set(inside.values())) > 1
    for file in found:
        yield file, inside.get(file) if several else None


def _readable(file: Path, root: Path) -> bool:
    if any(part.startswith(".") for part in file.relative_to(root).parts):
        return False
    suffix = file.suffix.lower()
    return bool(suffix in RECORD_SUFFIXES or TEXT_SUFFIXES.fullmatch(suffix)) and file.is_file()


def _records(file: Path, field: str | None, group_field: str | None) -> Iterator[Document]:
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadDataError(f"{where} is not a line of JSON ({error})", "Mend or remove the line") from error
        yield document_of_record(record, where, field, group_field=group_field)


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


def _group(record: Mapping[str, Any], where: str, field: str | None) -> str | None:
    for name in GROUP_FIELDS if field is None else (field,):
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int | float) and not isinstance(value, bool):
            # Another file that counts from 0 means other sources by the same numbers.
            return f"{where.rpartition(':')[0]}:{value}"
    return None


def _dataset_documents(
    source: str, field: str | None, group_field: str | None, limit_characters: int
) -> Iterator[Document]:
    """A data set's rows in its order, until the limit is reached; a field that the source names goes before `field`."""
    named = parse_dataset(source)
    characters = 0
    for number, row in enumerate(_rows(source, named), start=1):
        document = document_of_record(row, f"{source}:{number}", named.field or field, group_field=group_field)
        yield document
        characters += len(document.text)
        if characters >= limit_characters:
            return


def _rows(source: str, named: DatasetName) -> Iterator[Any]:
    library = _library(source)
    try:
        yield from library.load_dataset(
            named.name, named.config, split=named.split, revision=named.revision, streaming=True
        )
    except (FileNotFoundError, ValueError) as error:  # no such data set; no such configuration or split
        raise MissingInputError(f"{source} cannot be read ({_first_line(error)})", _FORM) from error
    except (ConnectionError, TimeoutError, OSError) as error:
        raise RemoteError(
            f"{source} cannot be fetched ({_first_line(error)})", "Try again, or name a local file of JSON lines"
        ) from error
    except RuntimeError as error:  # among them: a data set that would need its own code
        raise BadDataError(
            f"{source} cannot be read ({_first_line(error)})", "Save it as JSON lines and name that file"
        ) from error


def _library(source: str) -> Any:
    """Import `datasets`, which is not among what every installation has."""
    install = "Install it with: pip install 'moe-svd-distill[datasets]'"
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(f"{source} needs the package 'datasets' ({error})", install) from error
    version = str(getattr(library, "__version__", "unknown"))
    major = re.match(r"\d+", version)
    if major is None or int(major[0]) < _OLDEST:
        raise UsageError(f"{source} needs the package 'datasets' from version {_OLDEST} on (found {version})", install)
    return library


def _first_line(error: BaseException) -> str:
    return reason_of(error)
