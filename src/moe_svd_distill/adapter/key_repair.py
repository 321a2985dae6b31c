"""Renaming LoRA tensors that PEFT would silently ignore.

Known wrong spellings: ``.weight`` kept before the LoRA suffix, no ``base_model.model.`` in front, PEFT's adapter name
inside (``.lora_A.default.weight``), or no ``.weight`` behind; of a head saved whole the same, with PEFT's name in
memory (``lm_head.modules_to_save.default.weight``). Only names change. A renamed adapter starts to act: what
it then does to the student must be measured, above all its scale, which such files often carry inside B already.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_svd_distill.adapter.adapter_file import adapter_header
from moe_svd_distill.adapter.naming import parse_key, right_name
from moe_svd_distill.errors import BadDataError, CannotWriteError
from moe_svd_distill.files.header import PREFIX_BYTES, packed_header, raw_header
from moe_svd_distill.files.reading import opened, read_pieces
from moe_svd_distill.files.writing import durable_file

_ACTION = "Write the adapter again"


def unmatched_keys(keys: Iterable[str]) -> dict[str, str]:
    """The keys that PEFT would not match, each with the reason."""
    faults = {}
    for key in keys:
        try:
            parse_key(key)
        except BadDataError as error:
            faults[key] = error.what
    return faults


def repaired_keys(keys: Iterable[str]) -> dict[str, str]:
    """Every key to the name PEFT matches; right ones stay as they are.

    Raises:
        BadDataError: A key is not a misspelt LoRA name, or two keys would get one name.
    """
    renamed: dict[str, str] = {}
    taken: dict[str, str] = {}
    for key in keys:
        new = right_name(key)
        if new in taken:
            raise BadDataError(f"{key} and {taken[new]} would both become {new}", _ACTION)
        taken[new] = key
        renamed[key] = new
    return renamed


def repair_keys(file: Path | str, output: Path | str) -> dict[str, str]:
    """Write a copy of an adapter's file with names that PEFT matches; the data is streamed byte for byte.

    Args:
        file: The adapter's file or folder.
        output: The copy. It must not exist.

    Returns:
        Old key to new key, for the keys that changed.

    Raises:
        BadDataError: The file is damaged, or a name is beyond repair.
        CannotWriteError: The output exists, or the disk refuses.
    """
    target = Path(output)
    if target.exists():
        raise CannotWriteError(f"{target} exists already", "Give another name for the repaired copy")
    source = adapter_header(file)
    renamed = repaired_keys(source.tensors)
    with opened(source.file) as descriptor:
        old = raw_header(descriptor, source.file, source.file_bytes)
        with durable_file(target) as stream:
            stream.write(_renamed_header(old, renamed))
            for piece in read_pieces(descriptor, source.file, len(old), source.file_bytes):
                stream.write(piece)
    return {before: after for before, after in renamed.items() if before != after}


def _renamed_header(old: bytes, renamed: dict[str, str]) -> bytes:
    """The header with other names and the same offsets."""
    content: dict[str, Any] = json.loads(old[PREFIX_BYTES:])
    return packed_header({renamed.get(key, key): value for key, value in content.items()}, copied=True)
