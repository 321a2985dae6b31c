"""What a unit of work produces: LoRA pairs, and the record of what was done to every tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.pairing.unit import TensorTask


@dataclass(frozen=True)
class TensorOutcome:
    """The fate of one student tensor.

    Attributes:
        name: Name of the view.
        left: LoRA B, (rows, rank), or None where nothing is changed.
        right: LoRA A, (rank, columns), or None.
        record: Facts for the run's record; plain JSON types.
    """

    name: str
    left: Tensor | None
    right: Tensor | None
    record: dict[str, Any]


def kept(task: TensorTask, reason: str) -> TensorOutcome:
    """The outcome of a tensor that stays as it is."""
    return TensorOutcome(task.name, None, None, {**_identity(task), "fate": "kept", "reason": reason})


def changed(task: TensorTask, left: Tensor, right: Tensor, facts: dict[str, Any]) -> TensorOutcome:
    """The outcome of a tensor with a delta."""
    return TensorOutcome(task.name, left, right, {**_identity(task), "fate": "lora", "rank": left.shape[1], **facts})


def _identity(task: TensorTask) -> dict[str, Any]:
    identity: dict[str, Any] = {"name": task.name, "role": task.role, "shape": list(task.shape)}
    if task.expert is not None:
        identity["expert"] = task.expert
    return identity
