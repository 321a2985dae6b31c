"""One record of a file of JSON lines, or one row of a data set, as a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_svd_distill.calibration.chat import as_chat
from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.errors import BadDataError

FIELDS = ("text", "messages", "conversations")
"""Where a record's content is looked for unless a field is named, in this order."""

GROUP_FIELDS = ("group", "repo", "repository", "repo_name", "package", "conversation_id")
"""Where the source a record belongs to is looked for unless a field is named, in this order."""


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


def _group(record: Mapping[str, Any], where: str, field: str | None) -> str | None:
    for name in GROUP_FIELDS if field is None else (field,):
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int | float) and not isinstance(value, bool):
            # Another file that counts from 0 means other sources by the same numbers.
            return f"{where.rpartition(':')[0]}:{value}"
    return None
