"""What happens during a run, as plain data: workers send it to the parent, which passes it on to whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

WEIGHTS_STAGE = "weights stage"
DOWNLOADING = "downloading "


@dataclass(frozen=True)
class Noted:
    """What people should know."""

    text: str


@dataclass(frozen=True)
class StageReached:
    """A step of the run, and how much of it is done, from 0 to 1; None where that cannot be known.

    Args:
        name: Of the step.
        fraction: That is done.
        amount: How much of how much in words, such as "1.2 of 4.8 GB".
    """

    name: str
    fraction: float | None = None
    amount: str = ""

    @classmethod
    def counted(cls, name: str, done: int, total: int) -> StageReached:
        """So much of so much is done; of 0 where that is not known. Of a download the numbers are bytes, and said."""
        amount = f"{done / 1e9:,.2f} of {total / 1e9:,.2f} GB" if name.startswith(DOWNLOADING) else ""
        return cls(name, done / total if total else None, amount)


@dataclass(frozen=True)
class Measured:
    """Figures of a part of the run, for those who draw curves.

    Args:
        part: Such as "refined" or "evaluation".
        figures: Name to value.
        step: Of the optimiser; None for figures that stand at the end of the part.
    """

    part: str
    figures: Mapping[str, float]
    step: int | None = None


@dataclass(frozen=True)
class UnitsPlanned:
    """The units of the weights stage and their costs, before work begins."""

    units: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class WorkerStarted:
    """A process is ready for work on its device."""

    worker: int
    device: str
    pid: int


@dataclass(frozen=True)
class WorkerLost:
    """A process died or was ended because it hung; ``label`` names the unit it held, if any."""

    worker: int
    reason: str
    label: str | None


@dataclass(frozen=True)
class UnitStarted:
    """A worker has been given a unit."""

    worker: int
    label: str
    attempt: int


@dataclass(frozen=True)
class UnitProgress:
    """A worker reports how far it is with its unit, from 0 to 1."""

    worker: int
    label: str
    fraction: float


@dataclass(frozen=True)
class UnitFinished:
    """A unit's part is on the disk. A reused one was there before, and no worker touched it.

    Args:
        worker: Who computed it; None if it was reused.
        label: The unit.
        seconds: What it took in this run.
        reused: Whether an earlier run had computed it.
        backoff: Steps taken because memory ran out, such as "computed on the CPU".
        peak_bytes: The most anonymous memory that its worker has used so far.
    """

    worker: int | None
    label: str
    seconds: float
    reused: bool
    backoff: tuple[str, ...] = ()
    peak_bytes: int = 0


@dataclass(frozen=True)
class UnitFailed:
    """An attempt failed. ``detail`` is the traceback, for ``--debug``; ``peak_bytes`` is as of `UnitFinished`."""

    worker: int
    label: str
    attempt: int
    reason: str
    detail: str = ""
    peak_bytes: int = 0


@dataclass(frozen=True)
class UnitSetAside:
    """A unit failed on every attempt; the others go on without it."""

    label: str
    reason: str


@dataclass(frozen=True)
class PartRejected:
    """A part on the disk was damaged; it lies at ``moved_to`` now and its unit is computed again."""

    label: str
    reason: str
    moved_to: Path


Event: TypeAlias = (
    Noted
    | StageReached
    | Measured
    | UnitsPlanned
    | WorkerStarted
    | WorkerLost
    | UnitStarted
    | UnitProgress
    | UnitFinished
    | UnitFailed
    | UnitSetAside
    | PartRejected
)
Listener: TypeAlias = Callable[[Event], None]
"""Who is told how a run goes."""


def counting(tell: Listener) -> Callable[[str, int, int], None]:
    """For those that count: tells a listener the step, and how much of how much of it is done."""
    return lambda name, done, total: tell(StageReached.counted(name, done, total))
