"""Records of text as data sets have them: the forms that TRL, axolotl and LLaMA-Factory name, read as documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_svd_distill.calibration.chat import as_chat, well_formed
from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.errors import SHOWN_REASON_CHARACTERS, BadDataError, shown

FIELDS = ("text", "messages", "conversations")
"""Where a record's content is looked for unless a field is named, in this order."""

GROUP_FIELDS = ("group", "repo", "repository", "repo_name", "package", "conversation_id")
"""Where the source a record belongs to is looked for unless a field is named, in this order."""

_OTHERS = "no prompt and completion, no instruction and output"


def document_of_record(
    record: Any, where: str, field: str | None = None, *, group_field: str | None = None
) -> Document:
    """Read a record in one of these forms, the first that it has:

    - `text`: a text;
    - `messages`, `conversations`: a conversation in the `role`/`content` form of OpenAI, or in the `from`/`value` form
      of ShareGPT, with `tools` and `system` beside it;
    - `prompt` and `completion`: two texts, which follow one another as in TRL, or two lists of messages;
    - `instruction`, `input`, `output`: a conversation of two turns (alpaca), with `system` and `history`.

    Lone surrogates become the replacement character.

    Args:
        record: The record's fields.
        where: File and line, or data set and row; becomes the document's source.
        field: The one field to look in, for a text or messages.
        group_field: The one field that names the source the record belongs to, a string or a number; default: the
            first of `GROUP_FIELDS` that holds one. A record without is a source by itself.

    Raises:
        BadDataError: The record has none of these forms.
    """
    if not isinstance(record, Mapping):
        raise BadDataError(f"{where} is not a record (found: {type(record).__name__})", "Write one JSON object a line")
    group = _group(record, where, group_field)
    for name in FIELDS if field is None else (field,):
        value = record.get(name)
        if isinstance(value, str):
            return Document(where, well_formed(value), group=group)
        if value is None or (field is None and not isinstance(value, list)):
            continue
        return _conversation(value, record, where, f"no text in the field {name!r}, and no conversation either", group)
    if field is None:
        prompt, completion = record.get("prompt"), record.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            return Document(where, well_formed(prompt + completion), group=group)
        if isinstance(prompt, list) and isinstance(completion, list):
            return _conversation([*prompt, *completion], record, where, "no conversation", group)
        if "instruction" in record and "output" in record:
            return _conversation(None, record, where, "no instruction and output of text", group)
    looked = repr(field) if field is not None else f"'text' and no messages in {' or '.join(FIELDS[1:])}, {_OTHERS}"
    there = ", ".join(sorted(map(str, record))) or "nothing"
    there = there if there.isprintable() and len(there) <= SHOWN_REASON_CHARACTERS else shown(there)
    raise BadDataError(f"{where} has no text in the field {looked} (found: {there})", "Name the field that holds it")


def _conversation(value: Any, record: Mapping[str, Any], where: str, lacking: str, group: str | None) -> Document:
    """A conversation of these messages; None for those of the alpaca form."""
    try:
        return Document.of_chat(where, as_chat(_alpaca(record) if value is None else value, record), group)
    except ValueError as error:
        raise BadDataError(
            f"{where} has {lacking}: {error}", "Mend or remove the record, or name the field that holds its text"
        ) from error


def _alpaca(record: Mapping[str, Any]) -> list[dict[str, object]]:
    """The turns as LLaMA-Factory joins them: `history` first, `input` on a line below the instruction."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise ValueError("its history is not a list of pairs")
    asked = [part for part in (record["instruction"], record.get("input")) if part not in (None, "")]
    question = "\n".join(asked) if all(isinstance(part, str) for part in asked) else asked
    pairs = [*history, (question, record["output"])]
    return [
        {"role": role, "content": said}
        for pair in pairs
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def _group(record: Mapping[str, Any], where: str, field: str | None) -> str | None:
    for name in GROUP_FIELDS if field is None else (field,):
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int | float) and not isinstance(value, bool):
            # Another file that counts from 0 means other sources by the same numbers.
            return f"{where.rpartition(':')[0]}:{value}"
    return None
