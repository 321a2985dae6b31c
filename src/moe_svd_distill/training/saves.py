"""What a training run needs to go on, on the disk every few minutes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_svd_distill.execution.parts import (
    PartContent,
    find_fault,
    open_part,
    part_path,
    read_record,
    reject_part,
    write_part,
)

_TURNS = 2


class TrainingCheckpoints:
    """Two files in turn, so that there is a whole one while the other is written, or after it is damaged."""

    def __init__(self, folder: Path, key: str, writes: bool = True, every_s: float = 120.0) -> None:
        """Nothing is written yet.

        Args:
            folder: Where they lie.
            key: Hash of everything the run depends on.
            writes: Whether this process writes; the others of a run only read.
            every_s: Seconds between two saves.
        """
        self._folder, self._key, self._writes, self._every_s = folder, key, writes, every_s
        self._last = time.monotonic()
        self._turn = 0
        self.rejected: list[str] = []

    def due(self) -> bool:
        """Whether it is time for a save, by this process's clock."""
        return time.monotonic() - self._last >= self._every_s

    def write(self, tensors: dict[str, Tensor], record: Mapping[str, object]) -> None:
        """Save; the older of the two files is replaced."""
        self._last = time.monotonic()
        if self._writes:
            write_part(self._folder, self._name(self._turn), PartContent(tensors, dict(record)))
            self._turn = (self._turn + 1) % _TURNS

    def load(self) -> tuple[dict[str, Tensor], Mapping[str, Any]] | None:
        """The newest whole save; damaged ones are moved aside."""
        found: list[tuple[int, int, Path]] = []
        for turn in range(_TURNS):
            path = part_path(self._folder, self._name(turn))
            if not path.is_file():
                continue
            if find_fault(path, self._name(turn)) is None:
                found.append((int(read_record(path)["step"]), turn, path))
            elif self._writes:
                self.rejected.append(reject_part(path).name)
        if not found:
            return None
        _, turn, path = max(found)
        self._turn = (turn + 1) % _TURNS
        with open_part(path) as tensors:
            return {name: tensors[name].clone() for name in tensors}, read_record(path)

    def discard(self) -> None:
        """Delete them."""
        for turn in range(_TURNS):
            part_path(self._folder, self._name(turn)).unlink(missing_ok=True)

    def _name(self, turn: int) -> str:
        return f"training-{self._key}-{turn}"
