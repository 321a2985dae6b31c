"""A student with an adapter folded into its weights: ``W + scale · B A``, file by file.

The merged model has the student's own layout: the same files, headers, names and dtypes. A tensor without a pair is
copied byte for byte; a changed one is summed in fp32 block by block and rounded once to its stored dtype. So the memory
needed is one block, whatever the size of the model. A head that the adapter saves whole replaces the student's; where
that was tied to the embeddings, it becomes a tensor of its own and the merged config.json says so.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.adapter.keys import Factors
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.rewriting import copy_companions, rewrite
from moe_svd_distill.adapter.student import notes_on_student, student_of
from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.adapter.whole_head import base_head, refuse_codes, replaced_blocks, row_blocks
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.architecture.matrices import Matrix
from moe_svd_distill.architecture.stored import TensorSource
from moe_svd_distill.checkpoints import Checkpoint, TensorInfo, require_plain_files
from moe_svd_distill.checkpoints.configuration import CONFIG
from moe_svd_distill.checkpoints.shards import INDEX
from moe_svd_distill.errors import BadDataError, CannotWriteError
from moe_svd_distill.files.dtypes import BYTES_PER_ELEMENT, torch_dtype
from moe_svd_distill.files.header import read_header
from moe_svd_distill.files.names import CARD_FILE, CONFIGURATION_FILE
from moe_svd_distill.files.reading import json_object, locate, read_small
from moe_svd_distill.files.writing import json_text, new_folder


@dataclass(frozen=True)
class MergeReport:
    """What was merged.

    Attributes:
        output: The merged model's folder.
        merged: Stored tensors that are changed or replaced.
        copied: Tensors copied byte for byte.
        weights_files: Weights files written.
        bytes: Their tensors' size.
        companions: Other files copied.
        left_out: Files of the student that were not copied: other formats of its weights, and hidden files.
        untied: Whether the student tied its head to its embeddings and the merged model does not any more.
        warnings: What is not wrong but should be known.
    """

    output: Path
    merged: int
    copied: int
    weights_files: int
    bytes: int
    companions: tuple[str, ...]
    left_out: tuple[str, ...]
    untied: bool = False
    warnings: tuple[str, ...] = ()


def merge(
    adapter_folder: Path | str,
    student: Checkpoint | Path | str,
    output: Path | str,
    *,
    card: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Write the student with the adapter merged into it.

    Args:
        adapter_folder: Folder with adapter_model.safetensors and adapter_config.json.
        student: The student the adapter was made for, not quantised.
        output: A new or empty folder; it appears only when the merge is complete.
        card: The merged model's card; by default the student's is copied.
        on_progress: Told the bytes of tensors done and their total.

    Raises:
        BadDataError: A pair or a head saved whole has no matrix of its name and shape in the student, PEFT
            would not load it as it is, or a merged value is not finite. Nothing is written then.
        CannotWriteError: The output is not empty, or the disk is full.
    """
    configuration = read_json(Path(adapter_folder) / CONFIGURATION_FILE)
    architecture = student_of(student, configuration, "a merge")
    checkpoint = architecture.checkpoint
    require_plain_files(checkpoint)
    warnings = notes_on_student(Path(adapter_folder), checkpoint)
    pairs = LowRankPairs(adapter_folder, architecture)
    check_loads(adapter_folder, checkpoint.config)  # a merge does what PEFT does, and nothing where PEFT does nothing
    if pairs.head is not None:
        base_head(architecture)
    changes = changed_tensors(architecture, pairs)
    added = _added_head(pairs, architecture)
    target, total = Path(output).absolute(), checkpoint.total_bytes + (added.bytes if added else 0)
    _check_space(target, total)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    def change(info: TensorInfo) -> Iterator[Tensor] | None:
        if info is added:
            return replaced_blocks(pairs.read_head(), torch_dtype(info.dtype), info.name)
        return changes[info.name](checkpoint.read(info.name)) if info.name in changes else None

    files = sorted({info.file for info in checkpoint.values()})
    with new_folder(target) as folder:
        for file in files:
            place = folder / file.relative_to(checkpoint.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            rewrite(read_header(file), place, change, advance, added)
        untied = architecture.tied and pairs.head is not None
        changed = _untied_files(checkpoint, added) if untied else {}
        changed |= {CARD_FILE: card.encode()} if card else {}
        companions, left_out = copy_companions(checkpoint.folder, folder, set(files), changed)
    merged, copied = len(changes) + (added is not None), len(checkpoint) - len(changes)
    return MergeReport(target, merged, copied, len(files), total, companions, left_out, untied, warnings)


def _check_space(output: Path, needed: int) -> None:
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise CannotWriteError(
            f"{place} has {free / 1e9:.1f} GB free, the merged model needs {needed / 1e9:.1f} GB",
            "Free space, or give an output on another disk",
        )


Merged = Callable[[Tensor], Iterator[Tensor]]
"""Makes the merged tensor, in consecutive blocks of rows, from the stored one."""


def changed_tensors(architecture: Architecture, pairs: LowRankPairs) -> dict[str, Merged]:
    """Stored tensors that an adapter changes: ``W + scale · B A``, rounded once to the stored dtype, or a new head.

    Only headers are read here.

    Raises:
        BadDataError: A stored tensor is not of a floating-point dtype, or the adapter's file and configuration
            disagree.
    """
    alone: dict[str, Merged] = {}
    in_experts: dict[str, Merged] = {}
    converted: dict[str, Merged] = {}
    by_parameter: dict[str, list[Matrix]] = defaultdict(list)
    for name in pairs:
        matrix = architecture.by_name.get(name)
        if matrix is None or (matrix.stored and not matrix.transposed):
            alone[name] = partial(_merged, pairs, name)
        else:
            by_parameter[matrix.slot.name].append(matrix)
        pairs.scale(name)

    @lru_cache(maxsize=1)
    def restored(source: TensorSource) -> dict[str, Tensor]:
        """The changes of what transformers rearranges on loading, put back into the stored arrangement."""
        made = {slot.name: torch.zeros(slot.shape) for slot in source.slots}
        for matrix in (matrix for slot in source.slots for matrix in by_parameter.get(slot.name, ())):
            pair = pairs[matrix.name]
            region = matrix.within(made[matrix.slot.name])
            region.copy_(pair.scale * (pair.left.float() @ pair.right.float()))
        return source.restore(made, architecture.stored.names)

    def from_restored(source: TensorSource, name: str, weight: Tensor) -> Iterator[Tensor]:
        yield _finite((_wide(weight) + restored(source)[name]).to(weight.dtype), name)

    sources = (source for sources in architecture.stored.of_part.values() for source in sources)
    for source in sources if by_parameter else ():
        matrices = [matrix for slot in source.slots for matrix in by_parameter.get(slot.name, ())]
        for name in source.hub_names if matrices else ():
            if source.pieces:
                own = [matrix for matrix in matrices if not matrix.stored or matrix.name == name]
                in_experts[name] = partial(_merged_experts, pairs, own, name)
            else:
                converted[name] = partial(from_restored, source, name)
    found = alone | in_experts | converted
    if pairs.head is not None and architecture.head in architecture.checkpoint:
        found[architecture.head] = partial(_replaced, pairs, architecture.head)
    for name in found:
        refuse_codes(architecture.checkpoint[name])
    return found


def _merged(pairs: LowRankPairs, name: str, weight: Tensor) -> Iterator[Tensor]:
    pair = pairs[name]
    return _sums(weight, (pair.left.float(), pair.right.float()), pair.scale, name)


def _merged_experts(pairs: LowRankPairs, matrices: list[Matrix], name: str, weight: Tensor) -> Iterator[Tensor]:
    by_expert = {None if matrix.stored else matrix.piece.index: matrix for matrix in matrices}
    for number, expert in enumerate(weight[None] if None in by_expert else weight):
        matrix = by_expert.get(number) or by_expert.get(None)
        if matrix is None:
            yield expert
            continue
        pair = pairs[matrix.name]
        left, right = pair.left.float(), pair.right.float()
        yield from _sums(expert, (right.T, left.T) if matrix.transposed else (left, right), pair.scale, name)


def _replaced(pairs: LowRankPairs, name: str, weight: Tensor) -> Iterator[Tensor]:
    return replaced_blocks(pairs.read_head(), weight.dtype, name)


def _sums(weight: Tensor, factors: Factors, scale: float, name: str) -> Iterator[Tensor]:
    """``W + scale · left @ right`` for W (rows, columns), in blocks that need no second copy of W in fp32."""
    left, right = factors
    for rows in row_blocks(*weight.shape):
        block = weight[rows]
        yield _finite((_wide(block) + scale * (left[rows] @ right)).to(block.dtype), name)


def _wide(block: Tensor) -> Tensor:
    return block.double() if block.dtype is torch.float64 else block.float()


def _finite(merged: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(merged).all()):
        raise BadDataError(
            f"{name}: merged values that are not finite in {merged.dtype}", "Verify the adapter and the student"
        )
    return merged


def _added_head(pairs: LowRankPairs, architecture: Architecture) -> TensorInfo | None:
    """The head saved whole, to be added behind the other tensors of the embeddings' file in their dtype.

    None where nothing is saved whole, or where the student has the tensor already.
    """
    checkpoint, name = architecture.checkpoint, architecture.head
    if pairs.head is None or name in checkpoint:
        return None
    beside, shape = checkpoint[architecture.embedding], pairs.header.tensors[pairs.head].shape
    size = math.prod(shape) * BYTES_PER_ELEMENT[beside.dtype]
    return TensorInfo(name, shape, beside.dtype, size, beside.file, beside.file.stat().st_size)


def _untied_files(checkpoint: Checkpoint, added: TensorInfo | None) -> dict[str, bytes]:
    """The files beside the weights that change when a tied student gets a head of its own, by name.

    Loaders take the head from the embeddings while config.json ties the two, whatever else is in the weights files. So
    the merged model has a ``lm_head.weight``, an index that lists it, and a config.json that ties nothing.
    """
    config = dict(checkpoint.config)
    if isinstance(text := config.get("text_config"), dict) and "tie_word_embeddings" in text:
        config["text_config"] = text | {"tie_word_embeddings": False}
    changed = {CONFIG: json_text(config | {"tie_word_embeddings": False}).encode()}
    if added is not None and (checkpoint.folder / INDEX).exists():
        index: dict[str, Any] = json_object(read_small(locate(checkpoint.folder, INDEX)), INDEX, unique_keys=True)
        index["weight_map"][added.name] = added.file.relative_to(checkpoint.folder).as_posix()
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and isinstance(size := metadata.get("total_size"), int):
            metadata["total_size"] = size + added.bytes
        if isinstance(metadata, dict) and isinstance(count := metadata.get("total_parameters"), int):
            metadata["total_parameters"] = count + math.prod(added.shape)
        changed[INDEX] = json_text(index).encode()
    return changed
