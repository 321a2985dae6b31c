"""Reads tensors for a unit in float32, one at a time, and applies the policy for NaN and Inf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moe_svd_distill.algebra.interpolation import linear, spherical
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.pairing.unit import Source

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.checkpoints import Checkpoint


class NonFiniteTensorError(Exception):
    """A tensor holds NaN or Inf and the policy is to leave alone whatever would be made from it."""


class TensorReader:
    """Teacher and student tensors on one device.

    Attributes:
        replaced: Tensor name to the number of entries that were NaN or Inf and taken as zero.
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
        self._sound: set[tuple[str, str]] = set()

    def student(self, name: str) -> Tensor:
        """A student tensor in float32."""
        return self._read(self._student, "student", name)

    def teacher(self, name: str) -> Tensor:
        """A teacher tensor in float32."""
        return self._read(self._teacher, "teacher", name)

    def teacher_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a teacher tensor in float32; only those rows are read."""
        return self._checked(self._teacher.read(name)[start:stop], "teacher", name)

    def student_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a student tensor in float32; only those rows are read."""
        return self._checked(self._student.read(name)[start:stop], "student", name)

    def teacher_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a teacher tensor, from its header."""
        return self._teacher[name].shape

    def blend(self, sources: Sequence[Source]) -> Tensor:
        """The teacher tensors of adjacent layers, interpolated; float32."""
        first = self.teacher(sources[0].name)
        if len(sources) == 1:
            return first
        return self._interpolate(first, self.teacher(sources[1].name), sources[1].weight)

    def interpolate(self, first: Tensor, second: Tensor, weight: float) -> Tensor:
        """Two tensors interpolated as the recipe says."""
        return self._interpolate(first, second, weight)

    def _read(self, checkpoint: Checkpoint, role: str, name: str) -> Tensor:
        tensor = self._checked(checkpoint.read(name), role, name)
        if name not in self.replaced:
            self._sound.add((role, name))
        return tensor

    def _checked(self, stored: Tensor, role: str, name: str) -> Tensor:
        tensor = stored.to(self.device).to(torch.float32)
        # One reduction finds NaN and Inf: either makes the sum non-finite.
        if (role, name) in self._sound or bool(torch.isfinite(tensor.sum())):
            return tensor
        bad = ~torch.isfinite(tensor)
        count = int(bad.sum())
        if count == 0:  # the sum itself left the range of float32
            return tensor
        where = f"{role} tensor {name} holds {count} NaN or Inf of {tensor.numel()} entries"
        if self._nan == "fail":
            raise BadDataError(where, "Repair the checkpoint, or choose nan: skip or nan: zero in the recipe")
        if self._nan == "skip":
            raise NonFiniteTensorError(where)
        self.replaced[name] = max(count, self.replaced.get(name, 0))
        return torch.where(bad, torch.zeros_like(tensor), tensor)
