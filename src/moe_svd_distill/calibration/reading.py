"""Reading documents from files, folders and named data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_svd_distill.calibration.datasets_source import DATASET_CHARACTERS, DATASET_PREFIX, dataset_documents
from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.records import document_of_record
from moe_svd_distill.errors import BadDataError, MissingInputError

RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TEXT_SUFFIXES = re.compile(
    r"\.(txt|text|md|markdown|rst|tex|html?|xml|csv|tsv|ya?ml|toml|ini|cfg|json|ipynb"
    r"|pyi?|[jt]sx?|c|cc|cpp|h|hpp|cu|java|kt|scala|go|rs|rb|php|swift|m|r|jl|lua|pl|sh|bash|sql|css)"
)


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


def _source(path: str | Path, field: str | None, group_field: str | None, limit_characters: int) -> Iterator[Document]:
    if str(path).startswith(DATASET_PREFIX):
        yield from dataset_documents(str(path), field=field, group_field=group_field, limit_characters=limit_characters)
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
