"""What the parts of one unit share: the reader, the way to the student's shape, and the gains of the norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from moe_svd_distill.pairing.unit import TensorTask, UnitOfWork
from moe_svd_distill.roles import ROLES, Geometry
from moe_svd_distill.transfer.reader import TensorReader
from moe_svd_distill.transfer.settings import TransferSettings
from moe_svd_distill.transfer.shaping import Shaper

if TYPE_CHECKING:
    from torch import Tensor

# Models trained independently match their neurons at a cosine of 0.18 to 0.22, permuted copies at nearly 1.
CORRESPONDENCE = 0.5
# A student gain below this share of the largest is not divided by: the channel is switched off in the student.
SMALLEST_GAIN = 1e-4


@dataclass
class UnitContext:
    """Everything a group of tensors needs to be transferred.

    Attributes:
        unit: The unit of work.
        reader: Reads both models.
        shaper: The projection.
        settings: The recipe's numbers.
        teacher: The teacher's sizes.
        student: The student's sizes.
        facts: Facts about the unit as a whole, for its record.
        report: Told the share of the unit that is done, 0 to 1.
    """

    unit: UnitOfWork
    reader: TensorReader
    shaper: Shaper
    settings: TransferSettings
    teacher: Geometry
    student: Geometry
    facts: dict[str, Any] = field(default_factory=dict)
    report: Callable[[float], None] = field(default=lambda fraction: None)

    @property
    def same_width(self) -> bool:
        """Whether teacher and student share the coordinates of the residual stream."""
        return self.teacher.hidden == self.student.hidden and self.shaper.residual_map is None

    def gain_ratio(self, task: TensorTask) -> Tensor | None:
        """Teacher gain over student gain of the norm before a tensor, (hidden,), or None where nothing is folded.

        ``W_T diag(g_T) x = (W_T diag(g_T / g_S)) diag(g_S) x``: the student's norm stays, the teacher's gain is kept.
        """
        norm = self.unit.norm(task.role)
        if self.settings.norms != "fold" or not self.same_width or norm is None:
            return None
        own = self.reader.student(norm.student) + norm.offsets[1]
        ratio = (self.reader.blend(norm.sources) + norm.offsets[0]) / own
        usable = own.abs() > SMALLEST_GAIN * own.abs().max()
        if left := int((~usable).sum()):
            self.facts.setdefault("norm_channels_not_folded", {})[norm.student.name] = left
        return torch.where(usable, ratio, torch.ones_like(ratio))

    def bring(self, task: TensorTask, matrix: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """A teacher matrix in the student's shape."""
        return self.shaper.bring(matrix, ROLES[task.role].axes, task.shape)


def source_facts(task: TensorTask) -> dict[str, Any]:
    """The teacher tensors a task is made from, for its record."""
    return {"sources": [[source.view.name, source.weight] for source in task.sources]}


def folded(target: Tensor, ratio: Tensor | None, facts: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The target with the ratio of norm gains folded into its columns."""
    if ratio is None:
        return target, facts
    return target * ratio, {**facts, "norm": "folded"}


def by_role(tasks: Mapping[str, TensorTask] | tuple[TensorTask, ...], *roles: str) -> list[TensorTask]:
    """The tasks with the given roles, in the roles' order; missing ones are left out."""
    known = {task.role: task for task in (tasks.values() if isinstance(tasks, Mapping) else tasks)}
    return [known[role] for role in roles if role in known]
