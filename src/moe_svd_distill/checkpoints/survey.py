"""Reading every header of a model and naming everything that is wrong with it, before any work starts.

Which weights files make up the model comes first: one file, an index with its shards, or numbered shards without one.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_svd_distill.checkpoints.configuration import read_config
from moe_svd_distill.checkpoints.quantisation.view import View, view_of
from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, shown
from moe_svd_distill.files.header import Header, TensorInfo, read_header
from moe_svd_distill.files.names import ADAPTER_FILE
from moe_svd_distill.files.reading import (
    FETCH_AGAIN,
    explain,
    json_object,
    locate,
    opened,
    read_at,
    read_small,
    relative_name,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
MAX_SHARDS = 100_000
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MAX_SMALL_TENSOR = 64 * 1024
_GIVE_FILE = "Give the .gguf file itself"
SHOWN_FAULTS = 8  # an error stays readable; `.faults` has all of them


@dataclass
class Survey:
    """What the headers of a model say, and all that is wrong with them.

    Attributes:
        config: The parsed ``config.json``.
        headers: File name to header.
        stored: Every tensor in the files.
        view: The weights that they make up.
        faults: All that is wrong.
        origin: Of a GGUF file, the hub checkpoint that it says it was made from, and the key it says so by.
    """

    config: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)
    stored: dict[str, TensorInfo] = field(default_factory=dict)
    view: View = field(default_factory=lambda: View({}))
    faults: list[DistillError] = field(default_factory=list)
    origin: tuple[str, str] | None = None


def survey(
    folder: Path,
    names: Collection[str] | None = None,
    headers_of: Callable[[Sequence[str]], Mapping[str, Header | DistillError]] | None = None,
    *,
    as_stored: bool = False,
    source: str | None = None,
) -> Survey:
    """Read the configuration, the index and every header; gather the faults instead of stopping at the first.

    Args:
        folder: Where the configuration and the index lie.
        names: All files of the model, where they are not all in the folder.
        headers_of: How to read the headers, where the weights files are not in the folder.
        as_stored: Leave quantised weights as the codes and companions that they are stored as.
        source: What the model is called in messages.
    """
    result = Survey()
    if names is None:
        try:
            names = list_names(folder)
        except DistillError as fault:
            result.faults.append(fault)
            return result
    try:
        result.config = read_config(folder)
    except DistillError as fault:
        result.faults.append(fault)
    try:
        layout = find_layout(folder, names)
    except DistillError as fault:
        result.faults = [fault] if fault.action == _GIVE_FILE else [*result.faults, fault]
        return result
    result.faults += layout.faults
    found = headers_of(layout.files) if headers_of else {name: _local_header(folder, name) for name in layout.files}
    for name, header in found.items():
        if isinstance(header, DistillError):
            result.faults.append(header)
        else:
            result.headers[name] = header
    result.faults += merge_headers(result)
    result.faults += _compare_with_index(layout, result, folder)
    result.view = View(result.stored)
    if not as_stored and not result.faults:
        result.view, faults = view_of(result.stored, result.config, source or str(folder), _small_tensor)
        result.faults += faults
    return result


def list_names(folder: Path) -> list[str]:
    """The names in the folder, sorted, so that the outcome does not depend on the file system's order."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208
    except OSError as error:
        raise explain(error, folder) from error


def _local_header(folder: Path, name: str) -> Header | DistillError:
    """The header of a file in the folder, or what is wrong with the file."""
    try:
        return read_header(locate(folder, name))
    except DistillError as fault:
        if not os.path.lexists(folder / name):
            return MissingInputError(f"the weights file {shown(name)} of {shown(folder)} is missing", FETCH_AGAIN)
        return fault


def _small_tensor(info: TensorInfo) -> bytes | None:
    """The bytes of a small tensor that says how others are stored; ``None`` where only the headers were fetched."""
    if not info.file.exists():
        return None
    if info.bytes > MAX_SMALL_TENSOR:
        found = f"found {info.bytes} bytes, expected at most {MAX_SMALL_TENSOR}"
        raise BadDataError(f"tensor {shown(info.name)} is not what its name says: {found}", FETCH_AGAIN)
    with opened(info.file) as descriptor:
        return read_at(descriptor, info.file, info.offset, info.bytes)


def merge_headers(result: Survey) -> list[DistillError]:
    """One mapping from all headers; a tensor that two files hold is a fault."""
    faults: list[DistillError] = []
    for name, header in result.headers.items():
        for info in header.tensors.values():
            earlier = result.stored.setdefault(info.name, info)
            if earlier is not info:
                what = f"tensor {shown(info.name)} is in two files, {shown(earlier.file)} and {shown(name)}"
                faults.append(BadDataError(what, FETCH_AGAIN))
    if result.headers and not result.stored:
        file = next(iter(result.headers.values())).file
        faults.append(BadDataError(f"{shown(file)} holds no tensor at all", FETCH_AGAIN))
    return faults


def _compare_with_index(layout: Layout, result: Survey, folder: Path) -> list[DistillError]:
    """The index and the headers have to say the same, both ways; files that could not be read are left out."""
    if layout.weight_map is None:
        return []
    faults: list[DistillError] = []
    for name, file in layout.weight_map.items():
        header = result.headers.get(file)
        if header is not None and name not in header.tensors:
            elsewhere = result.stored.get(name)
            found = f"found in {shown(elsewhere.file.relative_to(folder))}" if elsewhere else "found in no file"
            faults.append(
                BadDataError(f"the index puts tensor {shown(name)} into {shown(file)}, but it is {found}", FETCH_AGAIN)
            )
    for file, header in result.headers.items():
        for name in header.tensors:
            if name not in layout.weight_map:
                what = f"tensor {shown(name)} of {shown(file)} is not in the index of {shown(folder)}"
                faults.append(BadDataError(what, FETCH_AGAIN))
    return faults


@dataclass(frozen=True)
class Layout:
    """The weights files in order, what the index says about each tensor (if there is one), and what is wrong."""

    files: tuple[str, ...]
    weight_map: dict[str, str] | None
    faults: tuple[DistillError, ...]


def find_layout(folder: Path, names: Collection[str]) -> Layout:
    """Decide which of a model's files (``names``, relative to ``folder``) hold its weights.

    Only the index is opened, so the other files need not be there yet.
    """
    names = [name for name in names if name.isprintable()]
    if INDEX in names:
        return _indexed(folder, names)
    if SINGLE in names:
        return Layout((SINGLE,), None, ())
    stems = sorted({match["stem"] for match in map(NUMBERED.fullmatch, names) if match and "/" not in match["stem"]})
    if not stems:
        raise _no_weights(folder, names)
    chosen = [stem for stem in stems if stem.startswith("model")] or stems
    if len(chosen) > 1:
        raise BadDataError(
            f"{shown(folder)} holds several sets of numbered shards: {', '.join(map(shown, chosen))}",
            f"Leave only one of them in the folder, or add {INDEX}",
        )
    files = sorted(name for name in names if (match := NUMBERED.fullmatch(name)) and match["stem"] == chosen[0])
    return Layout(tuple(files), None, tuple(missing_numbers(files, shown(folder))))


def _indexed(folder: Path, names: Collection[str]) -> Layout:
    """The files that the index names, each name checked."""
    place = folder / INDEX
    index = json_object(read_small(locate(folder, INDEX)), shown(place), unique_keys=True)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadDataError(f"{shown(place)} has no weight_map", FETCH_AGAIN)
    faults: list[DistillError] = []
    files: list[str] = []
    texts = {tensor: file for tensor, file in weight_map.items() if isinstance(file, str)}
    others = [file for file in weight_map.values() if not isinstance(file, str)]
    for name in [*dict.fromkeys(texts.values()), *others[:1]]:
        try:
            files.append(relative_name(name, shown(place)))
        except BadDataError as fault:
            faults.append(fault)
    if SINGLE in names and SINGLE not in files:
        what = f"{shown(folder)} holds {SINGLE} and also {INDEX}, which names other files"
        faults.append(BadDataError(what, "Move the set of weights that is not meant out of the folder"))
    faults += missing_numbers(files, shown(place))
    return Layout(tuple(sorted(files)), texts, tuple(faults))


def missing_numbers(files: Iterable[str], place: str) -> list[DistillError]:
    """One fault for each set of shards ``…-00001-of-000NN`` of which some number is not among the files."""
    sets: dict[tuple[str, str], set[int]] = defaultdict(set)
    for file in files:
        if match := NUMBERED.fullmatch(file):
            sets[match["stem"], match["total"]].add(int(match["number"][-9:]))
    faults: list[DistillError] = []
    for (stem, total), numbers in sorted(sets.items()):
        count = int(total[-9:])
        if count > MAX_SHARDS:
            faults.append(BadDataError(f"{place} claims to have {count} shards {shown(stem)}", FETCH_AGAIN))
            continue
        expected = range(0, count) if 0 in numbers else range(1, count + 1)
        beyond = sorted(numbers - set(expected))
        if beyond:
            what = f"{place} has a shard {shown(stem)} with the number {beyond[0]} of {count}"
            faults.append(BadDataError(what, FETCH_AGAIN))
        absent = [number for number in expected if number not in numbers]
        if absent:
            example = f"{stem}{absent[0]:0{len(total)}d}-of-{total}.safetensors"
            what = f"{place} lacks {len(absent)} of {count} shards; the first missing one is {shown(example)}"
            faults.append(MissingInputError(what, FETCH_AGAIN))
    if len({stem for stem, _ in sets}) < len(sets):
        totals = ", ".join(sorted({total for _, total in sets}))
        faults.append(BadDataError(f"{place} mixes shards of different sets: of {totals}", FETCH_AGAIN))
    return faults


def _no_weights(folder: Path, names: Collection[str]) -> DistillError:
    """Say what was found instead of safetensors weights, and what to do about it."""
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        return BadDataError(
            f"{shown(folder)} holds no safetensors weights, only {shown(pickled[0])}, a pickle that is never loaded",
            "Convert the model to safetensors first: load it in transformers where it is trusted, "
            "then call save_pretrained",
        )
    others = sorted(name for name in names if name.endswith((".safetensors", ".gguf", ".h5", ".msgpack", ".npz")))
    found = f" (found {shown(others[0])})" if others else ""
    what = f"{shown(folder)} holds no {SINGLE}, no {INDEX} and no numbered shards{found}"
    if ADAPTER_FILE in names:
        return MissingInputError(what, "This is an adapter: give the folder of a whole model")
    if others and others[0].endswith(".gguf"):
        return MissingInputError(what, _GIVE_FILE)
    return MissingInputError(what, "Give the folder of a model with safetensors weights")


class BadCheckpointError(BadDataError):
    """A checkpoint with one or more faults; the first one is damaged or inconsistent data."""

    faults: tuple[str, ...] = ()


class MissingCheckpointError(MissingInputError):
    """A checkpoint with one or more faults; the first one is a file that is not there."""

    faults: tuple[str, ...] = ()


def raise_faults(faults: Sequence[DistillError]) -> None:
    """Raise one error for all faults: the first one's kind and action, and the wording of the rest."""
    if not faults:
        return
    first = faults[0]
    wordings = tuple(fault.what for fault in faults)
    what = "; ".join(wordings[:SHOWN_FAULTS])
    if len(wordings) > 1:
        what = f"{len(wordings)} faults: {what}"
    if len(wordings) > SHOWN_FAULTS:
        what += f"; and {len(wordings) - SHOWN_FAULTS} more"
    kind = MissingCheckpointError if isinstance(first, MissingInputError) else BadCheckpointError
    error = kind(what, first.action)
    error.faults = wordings
    raise error
