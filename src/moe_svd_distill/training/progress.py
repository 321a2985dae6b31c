"""Where a training run stands, what that says about going on, and its saves on the disk."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.execution.parts import (
    find_fault,
    part_path,
    part_tensors,
    read_record,
    reject_part,
    write_part,
)
from moe_svd_distill.files.typed import read_as

if TYPE_CHECKING:
    from torch import Tensor

_TURNS = 2
_DIVERGED = 3.0  # times the KL before training, on the checking text; large rates raise it at first, without harm


@dataclass(frozen=True)
class Point:
    """A point of the training curve.

    Attributes:
        step: Steps done.
        tokens: Tokens seen so far, repeated ones counted again.
        seconds: Of training, over all runs that were needed.
        loss: Mean loss of the steps since the last point; None at the beginning.
        kl: KL on the checking text, in nats per token.
        rate: Learning rate of the factors in the last step.
    """

    step: int
    tokens: int
    seconds: float
    loss: float | None
    kl: float
    rate: float


@dataclass
class Progress:
    """Where a run stands, besides the tensors.

    Attributes:
        steps: That are planned.
        step: Steps done.
        seconds: Of training, over all runs that were needed.
        curve: Its points; the first is before training.
        best: The best one's place in the curve.
        losses: Of the steps since the last point.
        halvings: How often it began anew at half the rate.
        ended: Why it ended: ``done``, ``no more gain`` or ``diverged``; empty before.
        resumed_at: The step this run went on from.
        rejected: Damaged saves that were moved aside.
    """

    steps: int
    step: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    best: int = 0
    losses: list[float] = field(default_factory=list)
    halvings: int = 0
    ended: str = ""
    resumed_at: int = 0
    rejected: list[str] = field(default_factory=list)

    @classmethod
    def of_save(cls, record: Mapping[str, Any], steps: int) -> Progress:
        """Where the run stood when it was saved."""
        stood = read_as(cls, {"steps": steps, **record})
        return replace(stood, resumed_at=stood.step, rejected=[])

    def record(self) -> Mapping[str, object]:
        """For a save."""
        return asdict(self)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.step == self.steps or bool(self.ended)

    def begins_badly(self, kl: float, halvings: int) -> bool:
        """Whether the first check is no better than the start, and the rate may still be halved."""
        return len(self.curve) == 1 and self.halvings < halvings and not kl < self.curve[0].kl

    def begin_anew(self) -> None:
        """Back to the start, at half the rate."""
        self.halvings, self.step = self.halvings + 1, 0
        self.losses.clear()

    def note(self, kl: float, tokens: int, rate: float, patience: int) -> bool:
        """Put a point on the curve; returns whether it is the best."""
        loss = sum(self.losses) / len(self.losses)
        self.losses.clear()
        self.curve.append(Point(self.step, tokens, self.seconds, loss, kl, rate))
        if not math.isfinite(kl) or kl > _DIVERGED * self.curve[0].kl:
            self.ended = "diverged"
        if kl < self.curve[self.best].kl:
            self.best = len(self.curve) - 1
            return True
        if self._checks_without_gain() >= patience:
            self.ended = self.ended or "no more gain"
        return False

    def _checks_without_gain(self) -> int:
        """Checks at the end of the curve of which none was lower than the one before."""
        pairs = zip(reversed(self.curve[:-1]), reversed(self.curve), strict=False)
        return sum(1 for _ in takewhile(lambda pair: not pair[1].kl < pair[0].kl, pairs))


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
        self._step: int | None = None  # of the newest save
        self._written: float | None = None  # when, by this run
        self.rejected: list[str] = []

    def due(self) -> bool:
        """Whether it is time for a save, by this process's clock."""
        return time.monotonic() - self._last >= self._every_s

    @property
    def next_run(self) -> str:
        """Where training would go on if this run stopped now, in words."""
        if self._step is None:
            return "training begins anew, as nothing of it had been saved yet"
        when = "as this run did" if self._written is None else f"saved {time.monotonic() - self._written:,.0f} s ago"
        return f"training goes on from step {self._step:,}, {when}"

    def write(self, tensors: dict[str, Tensor], record: Mapping[str, object]) -> None:
        """Save; the older of the two files is replaced."""
        self._last = time.monotonic()
        if self._writes:
            write_part(self._folder, self._name(self._turn), tensors, record)
            self._turn = (self._turn + 1) % _TURNS
        self._step, self._written = int(str(record["step"])), time.monotonic()

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
        self._step, turn, path = max(found)
        self._turn = (turn + 1) % _TURNS
        return {name: tensor.clone() for name, tensor in part_tensors(path).items()}, read_record(path)

    def _name(self, turn: int) -> str:
        return f"training-{self._key}-{turn}"
