"""Which weights files make up a model: one file, an index with its shards, or numbered shards without one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, shown
from moe_svd_distill.files.names import ADAPTER_FILE
from moe_svd_distill.files.reading import FETCH_AGAIN, json_object, locate, read_small, relative_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
MAX_SHARDS = 100_000
GGUF = ".gguf"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MEND_INDEX = f"{FETCH_AGAIN}; if it comes so, give a copy of its folder without {INDEX}: the files say the same"


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
        raise BadDataError(f"{shown(place)} has no weight_map", MEND_INDEX)
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


def gguf_files(names: Collection[str]) -> list[str]:
    """The GGUF files among a model's files where these hold its weights: there are no others but pickles."""
    if any(name.endswith(".safetensors") or name == INDEX for name in names):
        return []
    return sorted(name for name in names if name.lower().endswith(GGUF))


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
    if found := gguf_files(names):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        what = f"{shown(folder)} is a folder of GGUF files ({shown(found[0])}{more})"
        return MissingInputError(what, "Give the file itself, of a model in several files the first one")
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        return BadDataError(
            f"{shown(folder)} holds no safetensors weights, only {shown(pickled[0])}, a pickle that is never loaded",
            "Convert the model to safetensors first: load it in transformers where it is trusted, "
            "then call save_pretrained",
        )
    others = sorted(name for name in names if name.endswith((".safetensors", ".h5", ".msgpack", ".npz")))
    instead = f" (found {shown(others[0])})" if others else ""
    what = f"{shown(folder)} holds no {SINGLE}, no {INDEX} and no numbered shards{instead}"
    if ADAPTER_FILE in names:
        return MissingInputError(what, "This is an adapter: give the folder of a whole model")
    return MissingInputError(what, "Give the folder of a model with safetensors weights")
