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
from moe_svd_distill.execution.parts import PartContent, write_part
from moe_svd_distill.pipeline.states import Body
from moe_svd_distill.streaming import ScaledAdapter, group_of, load_head
from moe_svd_distill.training.job import EMBEDDING, HEAD

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from moe_svd_distill.pipeline.pair import ModelPair


@dataclass(frozen=True, eq=False)
class Start:
    """What training begins with.

    Attributes:
        path: The part for the job.
        carried: Hub name to ``(B, A)`` as stored, for pairs that stay as they are: those of the embeddings.
        names: Hub names of the pairs that training goes on with.
    """

    path: Path
    carried: Mapping[str, tuple[Tensor, Tensor]]
    names: tuple[str, ...]


def read_start(
    pair: ModelPair, body: Body | None, ranks: Mapping[str, int], student_ids: NDArray[np.int64], folder: Path
) -> Start:
    """Write down what training begins with.

    Args:
        pair: Teacher and student.
        body: The adapter to begin with; None for none.
        ranks: Hub name to rank of every matrix that is trained.
        student_ids: Rows of the student's head that stand for the common tokens.
        folder: Where parts lie.

    Raises:
        IncompatiblePairError: It changes something that cannot be trained.
        BadDataError: Its configuration disagrees with its tensors.
    """
    tensors: dict[str, Tensor] = {}
    carried: dict[str, tuple[Tensor, Tensor]] = {}
    names: list[str] = []
    if body is not None and any(body.scales.values()):
        architecture = pair.student.architecture
        found = LowRankPairs(body.folder, architecture)
        for name in found:
            scale = found.scale(name) * float(body.scales.get(group_of(found.parameter(name)), 1.0))
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
            left, right = _within_full_rank(scale * left.float(), right.float())
            tensors |= {f"{name}#A": right, f"{name}#B": left}
            names.append(name)
        change = _head_change(pair, body, student_ids)
        if change is not None:
            tensors[HEAD] = change
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes())
    path = write_part(folder, f"start-{digest.hexdigest()[:32]}", PartContent(tensors, {"pairs": len(names)}))
    return Start(path, carried, tuple(names))


def _within_full_rank(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with no more rank than its smaller side; stages pad ranks so that all are alike."""
    rows, columns, rank = len(left), right.shape[1], len(right)
    if rank <= min(rows, columns):
        return left, right
    product = left @ right
    return (torch.eye(rows), product) if rows <= columns else (product, torch.eye(columns))


def _head_change(pair: ModelPair, body: Body, student_ids: NDArray[np.int64]) -> Tensor | None:
    """What the start changes about the head, over the common tokens."""
    student = pair.student.checkpoint
    plain = load_head(student, "cpu", torch.float32, tokens=student_ids)
    changed = load_head(
        student, "cpu", torch.float32, tokens=student_ids, adapter=ScaledAdapter(body.folder, body.scales)
    )
    change = changed.weight - plain.weight
    return change if bool(change.any()) else None
