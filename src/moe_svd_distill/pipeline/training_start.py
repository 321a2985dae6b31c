"""What training begins with: the pairs of an adapter, and its change of the head."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.execution.parts import write_part
from moe_svd_distill.pipeline.stage_text import student_head
from moe_svd_distill.streaming import ScaledAdapter
from moe_svd_distill.training.job import EMBEDDING, HEAD
from moe_svd_distill.training.lora_pairs import full_rank_pair

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.schedule import TrainingSchedule
    from moe_svd_distill.pipeline.stage import StageInput
    from moe_svd_distill.training.lora_pairs import Pair


@dataclass(frozen=True, eq=False)
class Start:
    """What training begins with.

    Attributes:
        path: The part for the job.
        head: Change of the head over the common tokens, (v, d); None for none.
        carried: Hub name to ``(B, A)`` as stored, for pairs that stay as they are: those of the embeddings.
        pairs: How many pairs training goes on with.
    """

    path: Path
    head: Tensor | None
    carried: Mapping[str, Pair]
    pairs: int


def read_start(given: StageInput, schedule: TrainingSchedule) -> Start:
    """Write down what training begins with.

    Raises:
        IncompatiblePairError: It changes something that cannot be trained.
        BadDataError: Its configuration disagrees with its tensors.
    """
    tensors: dict[str, Tensor] = {}
    carried: dict[str, Pair] = {}
    head, pairs = None, 0
    if given.start is not None and given.start.acts:
        head = _head_change(given.pair, given.start, given.fit_text.student_ids)
        if not schedule.keeps_start:
            tensors, carried = _pairs(given.pair, given.start, schedule.ranks)
            pairs = sum(name.endswith("#A") and EMBEDDING not in name for name in tensors)
        if head is not None:
            tensors[HEAD] = head
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes())
    path = write_part(given.folder, f"start-{digest.hexdigest()[:32]}", tensors, {"pairs": pairs})
    return Start(path, head, carried, pairs)


def _pairs(
    pair: ModelPair, start: ScaledAdapter, ranks: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, Pair]]:
    """The pairs that training goes on with, by name and side, and those that are carried along as stored."""
    architecture = pair.student.architecture
    found = LowRankPairs(start.folder, architecture)
    tensors: dict[str, Tensor] = {}
    carried: dict[str, Pair] = {}
    for name in found:
        scale = found.scale(name) * start.scale_of(found.parameter(name))
        if name == architecture.head or scale == 0.0:
            continue
        left, right = found[name].left, found[name].right
        if name == architecture.embedding:
            tensors |= {f"{EMBEDDING}#A": right.clone(), f"{EMBEDDING}#B": scale * left}
            carried[name] = (scale * right.T, left.T.clone())  # kept transposed, as PEFT does
            continue
        if name not in ranks:
            raise IncompatiblePairError(
                f"the start changes {name}, which cannot be trained", "Train from another start"
            )
        left, right = scale * left.float(), right.float()
        if len(right) > min(len(left), right.shape[1]):  # stages pad ranks so that all are alike
            left, right = full_rank_pair(left @ right)
        tensors |= {f"{name}#A": right, f"{name}#B": left}
    return tensors, carried


def _head_change(pair: ModelPair, start: ScaledAdapter, student_ids: NDArray[np.int64]) -> Tensor | None:
    """What the start changes about the head, over the common tokens."""
    plain, changed = (student_head(pair, adapter, student_ids, "cpu") for adapter in (None, start))
    change = changed.weight - plain.weight
    return change if bool(change.any()) else None
