"""What was recorded at a layer for all sequences: in memory if it fits, in the journal's file if not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe_svd_distill.streaming.carried import NOTHING, Gate
from moe_svd_distill.streaming.states_file import StatesFile


class Recorded:
    """What was recorded, sequence by sequence, to read and to replace batch by batch.

    In memory a layer's results take the place of its inputs as they come, because a sequence depends on no other one.
    Where the next layer is given more or less, the inputs are read from the file meanwhile, if there is one.

    Attributes:
        spilled: Whether some of it stayed on the disk for want of memory.
    """

    def __init__(self, sequences: int, budget: int) -> None:
        """Before the first layer: nothing.

        Args:
            sequences: Their number.
            budget: Bytes that may lie in memory.
        """
        self._sequences, self._budget = sequences, budget
        self._gate: Gate = NOTHING
        self._path: Path | None = None
        self._old = torch.empty(sequences, 0, dtype=torch.uint8)
        self._new: Tensor | None = None
        self._held = self.spilled = False

    def rows(self, rows: slice) -> list[Tensor]:
        """Of some sequences, (rows, …), as views."""
        return self._gate.unpack(self._old[rows])

    def begin(self, width: int) -> None:
        """Results of so many bytes for a sequence are about to come."""
        fits = self._sequences * width <= self._budget
        self.spilled |= not fits
        if fits and self._held and self._old.shape[1] == width:
            self._new = self._old
            return
        if self._held and self._path is not None:
            self._old = StatesFile(self._path).rows(slice(None))
        self._new = torch.empty(self._sequences, width, dtype=torch.uint8) if fits else None

    def take_in(self, rows: slice, packed: Tensor) -> None:
        """Results of some sequences, (rows, bytes)."""
        if self._new is not None:
            self._new[rows] = packed

    def turn_to(self, gate: Gate, path: Path | None) -> None:
        """All results are there, and in this file too; None for those that lie in memory alone."""
        self._held = self._new is not None
        if self._new is not None:
            self._old = self._new
        else:
            assert path is not None
            self._old = StatesFile(path).rows(slice(None))
        self._gate, self._path, self._new = gate, path, None

    def load(self, gate: Gate, path: Path, step: int) -> None:
        """Go on from a file, so many sequences at once."""
        file = StatesFile(path)
        self.begin(file.shape[1])
        for rows in slices(self._sequences, step):
            self.take_in(rows, file.rows(rows))
        self.turn_to(gate, path)


def slices(count: int, step: int) -> Iterator[slice]:
    """Cut a number of sequences into batches."""
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))
