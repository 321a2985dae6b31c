"""Reading a few rows of a model's matrices within a budget, whatever its size."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from moe_svd_distill.errors import BadDataError, DistillError
from moe_svd_distill.files.dtypes import FLOATS
from moe_svd_distill.pipeline.pair import Model, ModelPair
from moe_svd_distill.roles import TensorView

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 256 * 1024  # rows are read in contiguous runs: the kernel reads at least 128 KiB around each access
EMBEDDING_ROWS = 1024
BLOCKS = 16  # but in at least so many places of a tensor


def spread_rows(rows: int, wanted: int, row_bytes: int) -> list[int]:
    """Row numbers, evenly spread over a tensor in contiguous runs.

    Args:
        rows: Rows there are.
        wanted: Rows to choose; all of them if there are not more.
        row_bytes: Bytes of one row.
    """
    if wanted >= rows:
        return list(range(rows))
    run = max(1, min(BLOCK_BYTES // max(1, row_bytes), wanted // BLOCKS))
    runs = max(1, wanted // run)
    starts = [number * (rows - run) // max(1, runs - 1) for number in range(runs)]
    return sorted({row for start in starts for row in range(start, start + run)})


def runs(index: list[int]) -> list[tuple[int, int]]:
    """Row numbers as half-open ranges of consecutive ones, in the same order."""
    found: list[tuple[int, int]] = []
    for row in index:
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return found


class RowSampler:
    """Rows of a model's tensors as float32, and how many bytes were asked for."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.bytes_read = 0

    def row_bytes(self, view: TensorView) -> int:
        """Bytes of one row of a matrix."""
        info, shape = self.model.checkpoint[view.stored], self._shape(view)
        return info.bytes * prod(shape[1:]) // max(1, prod(info.shape))

    def bytes_for(self, view: TensorView, rows: int) -> int:
        """Bytes that reading so many rows takes: of a transposed matrix, all of it."""
        return self.row_bytes(view) * (self._shape(view)[0] if view.transposed else rows)

    def rows(self, view: TensorView, index: list[int]) -> Tensor:
        """The rows ``index``, (len(index), columns).

        Raises:
            BadDataError: The tensor does not hold numbers, or holds NaN or Inf in these rows.
            DistillError: The weights are not on this machine, or cannot be read.
        """
        import torch

        name, info = view.stored, self.model.checkpoint[view.stored]
        if info.dtype not in FLOATS:
            raise BadDataError(f"{name} is of dtype {info.dtype}", "Give a model of floating-point weights")
        if not self.model.checkpoint.is_readable:
            raise DistillError(f"the weights of {self.model.checkpoint.source} are not on this machine", "Download it")
        self.bytes_read += self.bytes_for(view, len(index))
        read = self.model.checkpoint.read_rows
        if view.name == name:
            rows = torch.cat([read(name, begin, end).float() for begin, end in runs(index)])
        else:
            whole = self.model.checkpoint.read(name) if view.expert is None else self._matrix(view)
            rows = view.rows_of(whole)[index].float()
        if not bool(rows.isfinite().all()):
            raise BadDataError(f"{view.name} holds NaN or Inf", "Check the model")
        return rows

    def _matrix(self, view: TensorView) -> Tensor:
        assert view.expert is not None
        return self.model.checkpoint.read_matrix(view.stored, view.expert, 0, None, transposed=view.transposed)

    def _shape(self, view: TensorView) -> tuple[int, ...]:
        known = self.model.layout.meanings.get(view.name)
        return self.model.checkpoint[view.stored].shape if known is None else known.shape


def embedding_similarity(pair: ModelPair) -> float | None:
    """Mean cosine of embedding rows of the same number; exactly 1.0 only for identical embeddings.

    Up to ``EMBEDDING_ROWS`` rows, evenly spread, are read of each model. Rows of one lineage point the same way, those
    of models trained from different initial weights are at right angles.

    Args:
        pair: Teacher and student.

    Returns:
        The mean cosine, or None where the shapes differ or the weights are not on this machine.
    """
    import torch

    models = (pair.teacher, pair.student)
    names = [model.layout.find("embedding") for model in models]
    shapes = [model.shapes[name] for model, name in zip(models, names, strict=True) if name]
    if len(shapes) < 2 or shapes[0] != shapes[1] or not all(model.checkpoint.is_readable for model in models):
        return None
    tensors = [model.checkpoint.read(str(name)) for model, name in zip(models, names, strict=True)]
    step = max(1, shapes[0][0] // EMBEDDING_ROWS)
    rows = [tensor[::step] for tensor in tensors]
    if torch.equal(rows[0], rows[1]) and torch.equal(tensors[0], tensors[1]):
        return 1.0
    cosine = torch.nn.functional.cosine_similarity(rows[0].float(), rows[1].float(), dim=1)
    return min(float(cosine.nan_to_num(0.0).mean()), 1.0 - 1e-7)
