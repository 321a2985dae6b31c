"""A matrix inside a stored tensor: the weights stage works on these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorView:
    """A matrix ``(out, in)`` in a stored tensor: of an expert, transposed, some of its rows; or the whole tensor.

    Attributes:
        stored: Hub name of the stored tensor.
        expert: Where along its first dimension, if it has three.
        part: What the rows are called, where they are not all.
        transposed: Whether it is stored ``(in, out)``.
        start: First row.
        step: From one row to the next: 2 where two matrices are interleaved.
        rows: How many; None for all.
    """

    stored: str
    expert: int | None = None
    part: str = ""
    transposed: bool = False
    start: int = 0
    step: int = 1
    rows: int | None = None

    @property
    def matrix(self) -> str:
        """Name of the whole matrix it lies in, as `architecture.matrices` has it."""
        return self.stored if self.expert is None else f"{self.stored}[{self.expert}]"

    @property
    def name(self) -> str:
        """Its own name: that of the matrix if it is all of it."""
        return f"{self.matrix}.{self.part}" if self.part else self.matrix

    def within(self, matrix: Tensor) -> Tensor:
        """The rows in the matrix as it is stored, without a copy."""
        return self.rows_of(matrix.mT if self.transposed else matrix)

    def rows_of(self, matrix: Tensor) -> Tensor:
        """The rows in the whole matrix, (out, in), without a copy."""
        return matrix if self.rows is None else matrix[self.start :: self.step][: self.rows]
