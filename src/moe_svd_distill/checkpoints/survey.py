"""Reading every header of a model and naming everything that is wrong with it, before any work starts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.checkpoints.configuration import read_config
from moe_svd_distill.checkpoints.quantisation.reading import read_weights
from moe_svd_distill.checkpoints.quantisation.weights import ReadBytes, Weights
from moe_svd_distill.checkpoints.shards import MEND_INDEX, Layout, find_layout, gguf_files
from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, shown
from moe_svd_distill.files.header import Header, TensorInfo
from moe_svd_distill.files.reading import FETCH_AGAIN

if TYPE_CHECKING:
    from moe_svd_distill.checkpoints.storage import Storage

MAX_SMALL_TENSOR = 64 * 1024
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "module.": "DataParallel or DeepSpeed",
    "base_model.": "PEFT",
}
WRAPPER = re.compile(
    r"(?:.*\.)?(?P<word>_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.)|(?P<outer>module\.|base_model\.)"
)
SHOWN_FAULTS = 8  # an error stays readable; `.faults` has all of them


@dataclass
class Survey:
    """What the headers of a model say, and all that is wrong with them.

    Attributes:
        config: The parsed ``config.json``.
        headers: File name to header.
        weights: What their tensors make up.
        faults: All that is wrong.
        origin: Of a GGUF file, the hub checkpoint that it says it was made from, and the key it says so by.
    """

    config: dict[str, object] = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)
    weights: Weights = field(default_factory=lambda: Weights({}))
    faults: list[DistillError] = field(default_factory=list)
    origin: tuple[str, str] | None = None


def survey(storage: Storage, source: str) -> Survey:
    """Read the configuration, the index and every header; gather the faults instead of stopping at the first.

    Args:
        storage: Where they lie.
        source: What the model is called in messages.
    """
    result, folder = Survey(), storage.directory
    try:
        names = storage.file_names()
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
        result.faults = [fault] if gguf_files(names) else [*result.faults, fault]  # such folders need no config.json
        return result
    result.faults += layout.faults
    for name, header in storage.headers(layout.files).items():
        if isinstance(header, DistillError):
            result.faults.append(header)
        else:
            result.headers[name] = header
    stored, faults = merge_headers(result.headers)
    result.faults += faults
    result.faults += _compare_with_index(layout, result.headers, stored, folder)
    result.faults += _wrapped(stored)
    result.weights = Weights.as_stored(stored)
    if not result.faults:
        result.weights = read_weights(stored, result.config, source, _limited(storage.beginning))
        result.faults += result.weights.faults
    return result


def _limited(beginning: ReadBytes) -> ReadBytes:
    def read(info: TensorInfo, count: int) -> bytes | None:
        if count > MAX_SMALL_TENSOR and beginning(info, 0) is not None:
            found = f"found {info.bytes} bytes, expected at most {MAX_SMALL_TENSOR}"
            raise BadDataError(f"tensor {shown(info.name)} is not what its name says: {found}", FETCH_AGAIN)
        return beginning(info, count)

    return read


def merge_headers(headers: Mapping[str, Header]) -> tuple[dict[str, TensorInfo], list[DistillError]]:
    """The tensors of all headers, and what is wrong: a tensor that two files hold, or none at all."""
    stored: dict[str, TensorInfo] = {}
    faults: list[DistillError] = []
    for name, header in headers.items():
        for info in header.tensors.values():
            earlier = stored.setdefault(info.name, info)
            if earlier is not info:
                what = f"tensor {shown(info.name)} is in two files, {shown(earlier.file)} and {shown(name)}"
                faults.append(BadDataError(what, FETCH_AGAIN))
    if headers and not stored:
        file = next(iter(headers.values())).file
        faults.append(BadDataError(f"{shown(file)} holds no tensor at all", FETCH_AGAIN))
    return stored, faults


def _compare_with_index(
    layout: Layout, headers: Mapping[str, Header], stored: Mapping[str, TensorInfo], folder: Path
) -> list[DistillError]:
    """The index and the headers have to say the same, both ways; files that could not be read are left out."""
    if layout.weight_map is None:
        return []
    faults: list[DistillError] = []
    for name, file in layout.weight_map.items():
        header = headers.get(file)
        if header is not None and name not in header.tensors:
            elsewhere = stored.get(name)
            found = f"found in {shown(elsewhere.file.relative_to(folder))}" if elsewhere else "found in no file"
            faults.append(
                BadDataError(f"the index puts tensor {shown(name)} into {shown(file)}, but it is {found}", MEND_INDEX)
            )
    for file, header in headers.items():
        for name in header.tensors:
            if name not in layout.weight_map:
                what = f"tensor {shown(name)} of {shown(file)} is not in the index of {shown(folder)}"
                faults.append(BadDataError(what, MEND_INDEX))
    return faults


def _wrapped(stored: Mapping[str, TensorInfo]) -> list[DistillError]:
    """Names as they are inside a wrapper, which no class of a model has."""
    found = [match for match in map(WRAPPER.match, stored) if match]
    if not found:
        return []
    word, name = found[0]["word"] or found[0]["outer"], found[0].string
    what = f"{len(found)} of {len(stored)} tensors are named as inside {WRAPPERS[word]}, such as {shown(name)}"
    action = f"Save the model from inside the wrapper, or take {shown(word)} out of the names"
    if word == "base_model.":
        action = "Merge the adapter into its base model (merge_and_unload), and save that"
    return [BadDataError(what, action)]


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
