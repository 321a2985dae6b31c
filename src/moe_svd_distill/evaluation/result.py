"""What an evaluation finds, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from moe_svd_distill.algebra.figures import (
    Figures,
    Interval,
    Measurement,
    cross_entropy_gap_closed,
    kl_gap_closed,
    plain,
)
from moe_svd_distill.calibration.domain import DomainDistance
from moe_svd_distill.evaluation.bootstrap import Bootstrap
from moe_svd_distill.evaluation.verdict import Effect

Place: TypeAlias = Literal["resident", "streamed"]


@dataclass(frozen=True)
class GapClosed:
    """Percent of the way from the untouched student to the teacher; None where the student is not behind.

    Attributes:
        kl: (before − after) / before, of KL to the teacher.
        cross_entropy: (before − after) / (before − teacher's), of cross-entropy.
        kl_interval: 95 % bootstrap interval over documents.
        cross_entropy_interval: The same.
    """

    kl: float | None
    cross_entropy: float | None
    kl_interval: Interval | None = None
    cross_entropy_interval: Interval | None = None


@dataclass(frozen=True)
class Control:
    """The student with a random delta of the adapter's norms in its place."""

    seed: int
    figures: Figures
    gap_closed: GapClosed


@dataclass(frozen=True)
class TemperatureControl:
    """The untouched student with its logits divided by one temperature, which was fitted on other text.

    Attributes:
        temperature: T of the lowest KL on the text it was fitted on.
        fitted_on: `calibration text`, or `half of the text`: then the rest is about the other half.
        at_edge: Whether T stands at the end of the range that was searched.
        student: The untouched student on the documents measured here.
        figures: The student at temperature T on them.
        gap_closed: What the temperature closes there.
        adapter_gap_closed: What the adapter closes on the same documents.
        adapter_ahead: By how much KL is lower with the adapter than with the temperature, in nats per token; 95 %.
    """

    temperature: float
    fitted_on: str
    at_edge: bool
    student: Figures
    figures: Figures
    gap_closed: GapClosed
    adapter_gap_closed: GapClosed
    adapter_ahead: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**plain(self), "student": self.student.as_dict(), "figures": self.figures.as_dict()}


@dataclass(frozen=True)
class Aligned:
    """What the figures of a pair with different tokenizers are over.

    Both models' distributions are taken over the tokens that read the same bytes in both, each made to sum to 1 there,
    at the places where both have read the same characters and such a token follows.

    Attributes:
        common_tokens: Tokens that both models have.
        places: Places that are compared.
        places_share: Of the tokens the student predicts in the same text.
        teacher_mass: Mean probability that the teacher's whole distribution has on the common tokens at these places.
    """

    common_tokens: int
    places: int
    places_share: float
    teacher_mass: float

    @property
    def note(self) -> str:
        """In one sentence."""
        return (
            f"The tokenizers differ: measured over the {self.common_tokens:,} tokens both have, at the "
            f"{100 * self.places_share:.1f} % of the student's tokens where the two align; "
            f"{100 * self.teacher_mass:.1f} % of the teacher's probability is on tokens that both have."
        )


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one held-out text.

    Attributes:
        effect: In one word, from figures beyond noise.
        verdict: In one or two sentences, for the user.
        teacher: The teacher itself.
        student: The untouched student.
        adapted: The student with the adapter as PEFT loads it.
        gap_closed: What the adapter closes.
        controls: Random deltas of equal norm, one for each seed.
        temperature_control: One temperature on the untouched student; None with a single document.
        vocabulary: Tokens the distributions are taken over.
        sequence_length: Tokens of a sequence.
        unit: What the standard errors treat as independent: documents or sequences.
        seconds: Wall time.
        places: Where the states of each model came from.
        kept_states: Files of streamed states that stay for the next evaluation on the same text.
        domain: How far the text is from the calibration text; None where that is not known.
        aligned: What is compared of a pair with different tokenizers; None where they number their tokens alike.
    """

    effect: Effect
    verdict: str
    teacher: Figures
    student: Figures
    adapted: Figures
    gap_closed: GapClosed
    controls: tuple[Control, ...]
    temperature_control: TemperatureControl | None
    vocabulary: int
    sequence_length: int
    unit: str
    seconds: float
    places: dict[str, Place]
    domain: DomainDistance | None = None
    kept_states: tuple[str, ...] = ()
    aligned: Aligned | None = None

    @property
    def control_gap_closed(self) -> GapClosed | None:
        """The controls' mean; None without controls."""
        return mean_gap([control.gap_closed for control in self.controls]) if self.controls else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        control, temperature = self.control_gap_closed, self.temperature_control
        return {
            **plain(self),
            "teacher": self.teacher.as_dict(),
            "student": self.student.as_dict(),
            "adapted": self.adapted.as_dict(),
            "controls": [{**plain(control), "figures": control.figures.as_dict()} for control in self.controls],
            "control_gap_closed": None if control is None else plain(control),
            "temperature_control": None if temperature is None else temperature.as_dict(),
            "domain": None if self.domain is None else {**plain(self.domain), "ratio": _finite(self.domain.ratio)},
        }


def gap_between(before: Measurement, after: Measurement, teacher: Measurement, bootstrap: Bootstrap) -> GapClosed:
    """The gap that is closed from one measurement to another, with its intervals."""
    old, new = before.figures, after.figures
    return GapClosed(
        kl_gap_closed(old.kl, new.kl),
        cross_entropy_gap_closed(old.cross_entropy, new.cross_entropy, teacher.figures.cross_entropy),
        *bootstrap.gaps(before, after, teacher),
    )


def mean_gap(gaps: Sequence[GapClosed]) -> GapClosed:
    """The mean of several, without intervals unless there is only one."""
    if len(gaps) == 1:
        return gaps[0]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    return GapClosed(mean([gap.kl for gap in gaps]), mean([gap.cross_entropy for gap in gaps]))


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
