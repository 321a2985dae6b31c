"""The states between two layers: in memory if they fit, on the disk if not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moe_svd_distill.streaming.states_file import StatesFile


class States(Protocol):
    """States of all sequences, to read and to replace batch by batch."""

    spilled: bool

    def rows(self, rows: slice) -> Tensor:
        """Those of some sequences, (rows, length, d)."""

    def take_in(self, rows: slice, states: Tensor) -> None:
        """Replace those of some sequences, if they are held here."""

    def turn_to(self, path: Path) -> None:
        """The file on the disk has become the newest."""


class ResidentStates:
    """All states in memory. A layer's results replace its inputs as they come: a batch depends on no other batch."""

    spilled = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._states = torch.empty(shape, dtype=dtype)

    def rows(self, rows: slice) -> Tensor:
        """Those of some sequences, as a view."""
        return self._states[rows]

    def take_in(self, rows: slice, states: Tensor) -> None:
        """Replace those of some sequences."""
        self._states[rows] = states

    def turn_to(self, path: Path) -> None:
        """Nothing changes: what the file holds is here as well."""


class SpilledStates:
    """No state in memory: inputs come from the journal's file, which also receives the results."""

    spilled = True

    def __init__(self, path: Path) -> None:
        self._file = StatesFile(path)

    def rows(self, rows: slice) -> Tensor:
        """Those of some sequences, as a view on the file."""
        return self._file.rows(rows)

    def take_in(self, rows: slice, states: Tensor) -> None:
        """The journal writes them anyway."""

    def turn_to(self, path: Path) -> None:
        """Read from the newest file from now on."""
        self._file = StatesFile(path)


def states_from(path: Path, budget: int, step: int) -> States:
    """The states of a journal's file, in memory if they fit the budget.

    Args:
        path: The file.
        budget: Bytes they may take.
        step: Sequences to copy at once.
    """
    file = StatesFile(path)
    count = file.shape[0] * file.shape[1] * file.shape[2]
    if count * file.dtype.itemsize > budget:
        return SpilledStates(path)
    resident = ResidentStates(file.shape, file.dtype)
    for rows in slices(file.shape[0], step):
        resident.take_in(rows, file.rows(rows))
    return resident


def slices(count: int, step: int) -> Iterator[slice]:
    """Cut a number of sequences into batches."""
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))
