"""What the parts of one unit share: the reader, the way to the student's shape, and the gains of the norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from moe_svd_distill.algebra.projection import (
    ProjectionError,
    apply_residual_map,
    fourier_projection,
    slice_projection,
    svd_projection,
    vocabulary_procrustes,
)
from moe_svd_distill.algebra.sparsity import keep_largest
from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.pairing.unit import TensorTask, UnitOfWork
from moe_svd_distill.roles import ROLES, Geometry
from moe_svd_distill.transfer.factors import Delta
from moe_svd_distill.transfer.facts import TensorFacts, UnitFacts
from moe_svd_distill.transfer.reader import TensorReader
from moe_svd_distill.transfer.settings import TransferSettings

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.checkpoints import Checkpoint
    from moe_svd_distill.roles import Axis


# Models trained independently match their neurons at a cosine of 0.18 to 0.22, permuted copies at nearly 1.
CORRESPONDENCE = 0.5
# A student gain below this share of the largest is not divided by: the channel is switched off in the student.
SMALLEST_GAIN = 1e-4
PROCRUSTES_ROWS = 16384  # more rows change nothing: the map has far fewer degrees of freedom


@dataclass
class UnitContext:
    """Everything a group of tensors needs to be transferred.

    Attributes:
        unit: The unit of work.
        reader: Reads both models.
        settings: The recipe's numbers.
        teacher: The teacher's sizes.
        student: The student's sizes.
        residual_map: (student width, teacher width) map of the residual stream, for ``procrustes`` only.
        facts: Facts about the unit as a whole, for its record.
        report: Told the share of the unit that is done, 0 to 1.
    """

    unit: UnitOfWork
    reader: TensorReader
    settings: TransferSettings
    teacher: Geometry
    student: Geometry
    residual_map: Tensor | None = None
    facts: UnitFacts = field(default_factory=lambda: UnitFacts())
    report: Callable[[float], None] = field(default=lambda fraction: None)

    @property
    def same_width(self) -> bool:
        """Whether teacher and student share the coordinates of the residual stream."""
        return self.teacher.hidden == self.student.hidden and self.residual_map is None

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

    def bring(self, task: TensorTask, matrix: Tensor) -> tuple[Tensor, TensorFacts]:
        """A teacher matrix in the student's shape, and how it got there."""
        axes, shape = ROLES[task.role].axes, (task.shape[0], task.shape[1])
        projection, residual = self.settings.projection, self.residual_map
        if tuple(matrix.shape) == shape:
            if residual is None:
                return matrix, {"projection": "none: same shape"}
            return _through_map(matrix, axes, residual), {"projection": "procrustes"}
        if projection == "procrustes":
            mapped = _through_map(matrix, axes, residual)
            return slice_projection(mapped, shape), {"projection": "procrustes, then slice"}
        if projection == "fourier":
            return fourier_projection(matrix, shape), {"projection": "fourier"}
        if projection == "slice":
            return slice_projection(matrix, shape), {"projection": "slice"}
        try:
            return svd_projection(matrix, shape), {"projection": "svd"}
        except ProjectionError as error:
            fallback = fourier_projection(matrix, shape)
            return fallback, {"projection": "fourier", "projection_fallback": f"svd failed: {error}"}

    def delta(
        self,
        task: TensorTask,
        matrix: Tensor,
        student: Tensor,
        facts: TensorFacts,
        alignment: TensorFacts | None = None,
    ) -> Delta:
        """The difference of a teacher matrix, brought to the student's shape with the norm's gain, to the student's.

        Thinned out where the recipe asks for it.

        Args:
            task: The tensor.
            matrix: The teacher's matrix for it.
            student: The student's.
            facts: Where the matrix comes from, for the record.
            alignment: How its rows and columns were aligned, for the record.
        """
        target, how = self.bring(task, matrix)
        facts = {**facts, **how, **(alignment or {})}
        if (ratio := self.gain_ratio(task)) is not None:
            target, facts["norm"] = target * ratio, "folded"
        difference = target - student
        if self.settings.delta_sparsity < 1.0:
            difference = keep_largest(difference, self.settings.delta_sparsity, rescale=True)
            facts["kept_entries"] = self.settings.delta_sparsity
        return Delta(task, difference, float(torch.linalg.vector_norm(student)), facts)


def _through_map(matrix: Tensor, axes: tuple[Axis, ...], residual: Tensor | None) -> Tensor:
    return apply_residual_map(
        matrix, residual if axes[0] == "residual" else None, residual if axes[1] == "residual" else None
    )


def source_facts(task: TensorTask) -> TensorFacts:
    """The teacher tensors a task is made from, for its record."""
    return {"sources": [[source.view.name, source.weight] for source in task.sources]}


def by_role(tasks: Iterable[TensorTask], *roles: str) -> list[TensorTask]:
    """The tasks with the given roles, in the roles' order; missing ones are left out."""
    known = {task.role: task for task in tasks}
    return [known[role] for role in roles if role in known]


@lru_cache(maxsize=2)
def residual_map(teacher: Checkpoint, student: Checkpoint, embeddings: tuple[str, str] | None, device: str) -> Tensor:
    """(student width, teacher width) map for the ``procrustes`` projection, from the words both models embed.

    It is the same in every worker.

    Args:
        teacher: The teacher.
        student: The student.
        embeddings: Names of the teacher's and the student's embeddings.
        device: Where to put it.

    Raises:
        IncompatiblePairError: Embeddings are not known, or differ in size, so rows cannot be paired.
    """
    if embeddings is None:
        raise IncompatiblePairError(
            "projection procrustes pairs vocabulary rows, but the embeddings are not known", "Choose another projection"
        )
    rows, own_rows = teacher[embeddings[0]].shape[0], student[embeddings[1]].shape[0]
    if rows != own_rows:
        raise IncompatiblePairError(
            f"projection procrustes pairs vocabulary rows, but the teacher has {rows} and the student {own_rows}",
            "Choose another projection",
        )
    kept = slice(0, min(rows, PROCRUSTES_ROWS))
    found = vocabulary_procrustes(teacher.read(embeddings[0])[kept].float(), student.read(embeddings[1])[kept].float())
    return found.to(device)
