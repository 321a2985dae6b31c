"""Adapters of other programs made loadable: adapter_config.json from the header alone, and names that PEFT matches.

Known wrong spellings of names: see `naming.right_name`. Only names change. A renamed adapter starts to act: what it
then does to the student must be measured, above all its scale, which such files often carry inside B already.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from moe_svd_distill.adapter.adapter_file import adapter_header, shapes_of
from moe_svd_distill.adapter.configuration import (
    AdapterConfiguration,
    build_configuration,
    plain_configuration,
    refuse_incomplete,
)
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.naming import pair_shapes, parse_key, right_name, whole_modules
from moe_svd_distill.adapter.settling import settle_keys
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError, CannotWriteError
from moe_svd_distill.files.header import PREFIX_BYTES, packed_header, raw_header
from moe_svd_distill.files.reading import opened, read_pieces
from moe_svd_distill.files.writing import durable_file


def rebuild_configuration(
    adapter_file: Path | str, student: Path | str | None = None, *, base_model: str | None = None
) -> AdapterConfiguration:
    """The content of a right adapter_config.json. No weights are loaded.

    Args:
        adapter_file: The adapter's file or folder.
        student: The student's folder. Without it the configuration names the last part of each module's name alone:
            right for models without experts, and for programs that read an adapter by the names of its tensors.
        base_model: What to write as the base model; the student's folder if not given.

    Raises:
        MissingInputError: A file is not there.
        BadDataError: PEFT matches none of the keys as they are named (nothing is renamed silently), or the tensors
            cannot be one adapter.
    """
    header = adapter_header(adapter_file)
    shapes = shapes_of(header)
    if faults := unmatched_keys(shapes):
        raise BadDataError(
            f"{adapter_file}: PEFT never matches {len(faults)} of {len(shapes)} tensors and would load the adapter as "
            f"if they were not there; the first: {next(iter(faults.values()))}",
            "Write a copy with repaired names (repair_keys), or write the adapter again; no configuration can help",
        )
    if student is None:
        ranks = {module: pair.rank for module, pair in pair_shapes(shapes).items()}
        return plain_configuration(ranks, base_model=base_model or "", whole=tuple(whole_modules(shapes)))
    architecture = Architecture(open_checkpoint(student))
    pairs = LowRankPairs(header.file, architecture, configured=False)
    keys, ranks = settle_keys(architecture), {name: pairs.rank(name) for name in pairs}
    for target in keys.changed_by(ranks):
        refuse_incomplete(target, ranks)
    base, whole = base_model or str(student), pairs.head is not None
    return build_configuration(keys, pairs.parameter_ranks(), base_model=base, whole_head=whole)


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
            raise BadDataError(f"{key} and {taken[new]} would both become {new}", "Write the adapter again")
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
            content: dict[str, object] = json.loads(old[PREFIX_BYTES:])  # other names, the same offsets
            stream.write(packed_header({renamed.get(key, key): entry for key, entry in content.items()}, copied=True))
            for piece in read_pieces(descriptor, source.file, len(old), source.file_bytes):
                stream.write(piece)
    return {before: after for before, after in renamed.items() if before != after}
