"""The work a worker process does: a picklable callable that turns a unit into the content of its part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_svd_distill.execution.parts import PartContent
from moe_svd_distill.execution.worker import report_progress
from moe_svd_distill.roles import Geometry
from moe_svd_distill.transfer.settings import TransferSettings

if TYPE_CHECKING:
    from moe_svd_distill.checkpoints import Checkpoint
    from moe_svd_distill.pairing.unit import UnitOfWork


@dataclass(frozen=True)
class DistillWork:
    """Does units of one pair of models.

    Attributes:
        teacher: Reopens itself in the process it is sent to.
        student: The same.
        geometries: Sizes of teacher and student.
        settings: The recipe's numbers.
    """

    teacher: Checkpoint
    student: Checkpoint
    geometries: tuple[Geometry, Geometry]
    settings: TransferSettings

    def __call__(self, unit: UnitOfWork, device: str) -> PartContent:
        """Compute ``unit`` on ``device``."""
        from moe_svd_distill.transfer.unit import transfer_unit

        models = self.teacher, self.student
        return PartContent(*transfer_unit(unit, models, self.geometries, self.settings, device, report_progress))
