"""Reads tensors for a unit in float32, one at a time, and applies the policy for NaN and Inf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moe_svd_distill.algebra.dtypes import count_not_finite
from moe_svd_distill.algebra.interpolation import linear, spherical
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.pairing.unit import WeightedView

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.checkpoints import Checkpoint
    from moe_svd_distill.roles import TensorView


class NonFiniteTensorError(Exception):
    """A tensor holds NaN or Inf and the policy is to leave alone whatever would be made from it."""


class TensorReader:
    """Matrices and vectors of teacher and student on one device.

    Attributes:
        replaced: Name to the number of entries that were NaN or Inf and taken as zero.
    """

    def __init__(
        self, teacher: Checkpoint, student: Checkpoint, device: str, *, nan: str, interpolation: str = "linear"
    ) -> None:
        self._teacher = teacher
        self._student = student
        self._nan = nan
        self._interpolate = spherical if interpolation == "spherical" else linear
        self.device = device
        self.replaced: dict[str, int] = {}
        self._sound: set[tuple[Checkpoint, str]] = set()
        self._last: tuple[Checkpoint, str, Tensor] | None = None

    def student(self, view: TensorView) -> Tensor:
        """A matrix or vector of the student in float32."""
        return self._read(self._student, view)

    def teacher(self, view: TensorView) -> Tensor:
        """A matrix or vector of the teacher in float32."""
        return self._read(self._teacher, view)

    def teacher_rows(self, view: TensorView, start: int, stop: int) -> Tensor:
        """Rows of a matrix of the teacher in float32; only those rows are read."""
        return self._checked(self._stored(self._teacher, view, start, stop), self._teacher, view.name)

    def student_rows(self, view: TensorView, start: int, stop: int) -> Tensor:
        """Rows of a matrix of the student in float32; only those rows are read."""
        return self._checked(self._stored(self._student, view, start, stop), self._student, view.name)

    def blend(self, sources: Sequence[WeightedView]) -> Tensor:
        """The teacher's matrices of adjacent layers, interpolated; float32."""
        first = self.teacher(sources[0].view)
        if len(sources) == 1:
            return first
        return self._interpolate(first, self.teacher(sources[1].view), sources[1].weight)

    def _read(self, checkpoint: Checkpoint, view: TensorView) -> Tensor:
        tensor = self._checked(self._stored(checkpoint, view), checkpoint, view.name)
        if view.name not in self.replaced:
            self._sound.add((checkpoint, view.name))
        return tensor

    def _stored(self, checkpoint: Checkpoint, view: TensorView, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a view in the stored dtype. A matrix of several parts that is read whole is kept until another one
        is, so that it is dequantised once for all of them."""
        if view.matrix == view.stored == view.name:
            return checkpoint.read_rows(view.stored, start, stop)
        if view.expert is not None and stop is not None:
            first, last = view.start + view.step * start, view.start + view.step * stop
            rows = checkpoint.read_matrix(view.stored, view.expert, first, last, transposed=view.transposed)
            return rows[:: view.step]
        if self._last is None or self._last[:2] != (checkpoint, view.matrix):
            self._last = None
            if view.expert is None:
                whole = checkpoint.read(view.stored)
            else:
                whole = checkpoint.read_matrix(view.stored, view.expert, 0, None, transposed=view.transposed)
            self._last = (checkpoint, view.matrix, whole)
        return view.rows_of(self._last[2])[start:stop]

    def _checked(self, stored: Tensor, checkpoint: Checkpoint, name: str) -> Tensor:
        tensor = stored.to(self.device).to(torch.float32).contiguous()
        if (checkpoint, name) in self._sound or not (count := count_not_finite(tensor)):
            return tensor
        where = f"{checkpoint.title}: {name} holds {count} NaN or Inf of {tensor.numel()} entries"
        if self._nan == "fail":
            raise BadDataError(where, "Repair the checkpoint, or choose nan: skip or nan: zero in the recipe")
        if self._nan == "skip":
            raise NonFiniteTensorError(where)
        self.replaced[name] = max(count, self.replaced.get(name, 0))
        return torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor))
