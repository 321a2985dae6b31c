"""Where a training run stands, and how it went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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
    """Where a run stands, besides the tensors."""

    step: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    best: int = 0
    losses: list[float] = field(default_factory=list)
    halvings: int = 0
    ended: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For a save."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """From a save."""
        return cls(**{**values, "curve": [Point(**point) for point in values["curve"]]})


@dataclass(frozen=True)
class Outcome:
    """How training went; the bank and the head hold the best state.

    Attributes:
        curve: Its points; the first is before training.
        best: The best one's place in the curve.
        steps: Steps that were planned.
        ended: Why it ended: ``done``, ``no more gain`` or ``diverged``.
        seconds: Of training, over all runs that were needed.
        resumed_at: The step this run went on from.
        halvings: How often it began anew at half the rate.
        rejected: Damaged saves that were moved aside.
    """

    curve: tuple[Point, ...]
    best: int
    steps: int
    ended: str
    seconds: float
    resumed_at: int
    halvings: int
    rejected: tuple[str, ...]
