"""Reading a few rows of a model within a budget, whatever its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_svd_distill.errors import BadDataError, DistillError
from moe_svd_distill.pipeline.pair import Model

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 256 * 1024  # rows are read in contiguous runs: the kernel reads at least 128 KiB around each access
BLOCKS = 16  # but in at least so many places of a tensor
PLAIN_DTYPES = frozenset({"BF16", "F16", "F32", "F64"})


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

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a tensor."""
        info = self.model.checkpoint[name]
        return info.bytes // max(1, info.shape[0])

    def rows(self, name: str, index: list[int]) -> Tensor:
        """The rows ``index``, (len(index), columns).

        Raises:
            BadDataError: The tensor does not hold numbers, or holds NaN or Inf in these rows.
            DistillError: The weights are not on this machine, or cannot be read.
        """
        import torch

        info = self.model.checkpoint[name]
        if info.dtype not in PLAIN_DTYPES:
            raise BadDataError(f"{name} is of dtype {info.dtype}", "Give a model of floating-point weights")
        if not info.file.exists():
            raise DistillError(f"the weights of {self.model.checkpoint.source} are not on this machine", "Download it")
        self.bytes_read += len(index) * self.row_bytes(name)
        read = self.model.checkpoint.read_rows
        rows = torch.cat([read(name, begin, end).float() for begin, end in runs(index)])
        if not bool(rows.isfinite().all()):
            raise BadDataError(f"{name} holds NaN or Inf", "Check the model")
        return rows
