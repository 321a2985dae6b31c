"""A student with an adapter folded into its weights: ``W + scale · B A``, file by file.

The merged model has the student's own layout: the same files, headers, names and dtypes. A tensor without a pair is
copied byte for byte; a changed one is summed in fp32 block by block and rounded once to its stored dtype. So the memory
needed is one block, whatever the size of the model. A head that the adapter saves whole replaces the student's; where
that was tied to the embeddings, it becomes a tensor of its own and the merged config.json says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.adapter.changes import Changes
from moe_svd_distill.adapter.companions import copy_companions
from moe_svd_distill.adapter.load_check import check_loads
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.rewriting import Addition, rewrite
from moe_svd_distill.adapter.untying import added_head, untied_files
from moe_svd_distill.adapter.whole_head import base_head, replaced_blocks, student_of
from moe_svd_distill.checkpoints import Checkpoint, TensorInfo, refuse_quantised
from moe_svd_distill.errors import CannotWriteError
from moe_svd_distill.files.header import read_header
from moe_svd_distill.files.names import CONFIGURATION_FILE
from moe_svd_distill.files.writing import new_folder

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]


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
    """

    output: Path
    merged: int
    copied: int
    weights_files: int
    bytes: int
    companions: tuple[str, ...]
    left_out: tuple[str, ...]
    untied: bool = False


def merge(
    adapter_folder: Path | str,
    student: Checkpoint | Path | str,
    output: Path | str,
    *,
    on_progress: Progress = lambda done, total: None,
) -> MergeReport:
    """Write the student with the adapter merged into it.

    Args:
        adapter_folder: Folder with adapter_model.safetensors and adapter_config.json.
        student: The student the adapter was made for, not quantised.
        output: A new or empty folder; it appears only when the merge is complete.
        on_progress: Told the bytes of tensors done and their total.

    Raises:
        BadDataError: A pair or a head saved whole has no matrix of its name and shape in the student, the
            PEFT would not load it as it is, or a merged value is not finite. Nothing is written then.
        CannotWriteError: The output is not empty, or the disk is full.
    """
    configuration = read_json(Path(adapter_folder) / CONFIGURATION_FILE)
    architecture = student_of(student, configuration, "a merge")
    checkpoint = architecture.checkpoint
    refuse_quantised(checkpoint)
    pairs = LowRankPairs(adapter_folder, architecture)
    check_loads(adapter_folder, checkpoint.config)  # a merge does what PEFT does, and nothing where PEFT does nothing
    if pairs.head is not None:
        base_head(architecture)
    changes = Changes(architecture, pairs)
    addition = added_head(pairs, architecture)
    target, total = Path(output).absolute(), checkpoint.total_bytes + (addition[1].bytes if addition else 0)
    _check_space(target, total)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    def change(info: TensorInfo) -> Iterator[torch.Tensor] | None:
        if pairs.head is not None and info.name == architecture.head:
            return replaced_blocks(pairs.read_head(), checkpoint.read(info.name).dtype, info.name)
        return changes.merged(info.name) if info.name in changes else None

    def added(file: Path) -> Addition | None:
        return addition[1] if addition and addition[0] == file else None

    files = sorted({info.file for info in checkpoint.values()})
    with new_folder(target) as folder:
        for file in files:
            place = folder / file.relative_to(checkpoint.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            rewrite(read_header(file), place, change, advance, added(file))
        untied = architecture.tied and pairs.head is not None
        changed = untied_files(checkpoint, addition) if untied else {}
        companions, left_out = copy_companions(checkpoint.folder, folder, set(files), changed)
    replaced = pairs.head is not None and architecture.head in checkpoint
    merged = len(changes) + (pairs.head is not None)
    copied = len(checkpoint) - len(changes) - replaced
    return MergeReport(target, merged, copied, len(files), total, companions, left_out, untied)


def _check_space(output: Path, needed: int) -> None:
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise CannotWriteError(
            f"{place} has {free / 1e9:.1f} GB free, the merged model needs {needed / 1e9:.1f} GB",
            "Free space, or give an output on another disk",
        )
