"""Brings a teacher matrix to the student's shape when no correspondence of rows and columns is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_svd_distill.algebra.projection import (
    ProjectionError,
    fourier_projection,
    slice_projection,
    svd_projection,
)
from moe_svd_distill.algebra.residual_map import apply_residual_map

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.roles import Axis


@dataclass(frozen=True)
class Shaper:
    """The projection a recipe asks for.

    Attributes:
        projection: ``svd``, ``fourier``, ``slice`` or ``procrustes``.
        residual_map: (student width, teacher width) map of the residual stream, for ``procrustes`` only.
    """

    projection: str
    residual_map: Tensor | None = None

    def bring(self, matrix: Tensor, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> tuple[Tensor, dict[str, Any]]:
        """The matrix in the student's shape and how it got there.

        Args:
            matrix: Teacher matrix, (rows, columns).
            axes: What its rows and columns are.
            shape: The student's (rows, columns).
        """
        if tuple(matrix.shape) == tuple(shape):
            if self.residual_map is None:
                return matrix, {"projection": "none: same shape"}
            return self._through_map(matrix, axes), {"projection": "procrustes"}
        if self.projection == "procrustes":
            mapped = self._through_map(matrix, axes)
            return slice_projection(mapped, (shape[0], shape[1])), {"projection": "procrustes, then slice"}
        if self.projection == "fourier":
            return fourier_projection(matrix, (shape[0], shape[1])), {"projection": "fourier"}
        if self.projection == "slice":
            return slice_projection(matrix, (shape[0], shape[1])), {"projection": "slice"}
        try:
            return svd_projection(matrix, (shape[0], shape[1])), {"projection": "svd"}
        except ProjectionError as error:
            fallback = fourier_projection(matrix, (shape[0], shape[1]))
            return fallback, {"projection": "fourier", "projection_fallback": f"svd failed: {error}"}

    def _through_map(self, matrix: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        left = self.residual_map if axes[0] == "residual" else None
        right = self.residual_map if axes[1] == "residual" else None
        return apply_residual_map(matrix, left, right)
