"""What the figures say, in one word and in one sentence."""

from __future__ import annotations

from typing import Literal, TypeAlias

from moe_svd_distill.algebra.figures import Figures, Interval, Measurement
from moe_svd_distill.evaluation.change import cross_entropy_change, kl_change

Effect: TypeAlias = Literal["helps", "recalibrates", "mixed", "harms", "none", "unproven"]

ERRORS = 3.0
BAND = 0.02  # of KL: an interval within this is no effect, one beyond it says that the text is too little

_Gap: TypeAlias = tuple[float | None, Interval | None]


def effect_of(
    before: Measurement,
    after: Measurement,
    errors: float = ERRORS,
    *,
    kl_interval: Interval | None = None,
    ahead_of_temperature: Interval | None = None,
) -> Effect:
    """Judge by paired changes over documents, beyond `errors` standard errors.

    `mixed` is KL that falls while cross-entropy rises, which is no transfer; `recalibrates` is a fall that is not
    beyond that of one temperature on the student's logits. `none` is a fall whose interval lies within 2 % of KL around
    0; a wider one that holds 0 is `unproven`.

    Args:
        before: The untouched student.
        after: The student with the adapter.
        errors: Standard errors, as `Change.margin` reckons them.
        kl_interval: 95 % of the KL gap closed; what holds 0 does not help.
        ahead_of_temperature: 95 % of how much lower KL is with the adapter than with the temperature; None where no
            temperature was measured.
    """
    kl, risen = kl_change(before, after), cross_entropy_change(after, before)
    if kl_change(after, before).falls(errors):
        return "harms"
    if not kl.falls(errors) or (kl_interval is not None and kl_interval.low <= 0):
        if risen.falls(errors):
            return "harms"
        return "none" if abs(kl.fall) + kl.margin(errors) <= BAND * kl.before else "unproven"
    if risen.falls(1.0):
        return "mixed"
    if ahead_of_temperature is not None and ahead_of_temperature.low <= 0:
        return "recalibrates"
    return "helps"


def sentence(
    effect: Effect,
    before: Figures,
    after: Figures,
    *,
    kl: _Gap,
    cross_entropy: _Gap,
    control: _Gap = (None, None),
    temperature: _Gap = (None, None),
    other_domain: bool = False,
    aligned: str | None = None,
) -> str:
    """Say it to the user, with the figures it rests on.

    Args:
        effect: From `effect_of`.
        before: The untouched student.
        after: The student with the adapter.
        kl: Percent of the KL gap the adapter closes, and its 95 % interval.
        cross_entropy: The same of the cross-entropy gap.
        control: The same of KL, by the mean of the random deltas.
        temperature: The same of KL, by one temperature.
        other_domain: Whether the adapter was calibrated on text of another domain.
        aligned: What the figures of a pair with different tokenizers are over, in a sentence.
    """
    note = " Calibrated on text of another domain." if other_domain else ""
    note += "" if aligned is None else f" {aligned}"
    return _of_effect(effect, before, after, kl, cross_entropy, control, temperature) + note


def _of_effect(
    effect: Effect, before: Figures, after: Figures, kl: _Gap, cross_entropy: _Gap, control: _Gap, temperature: _Gap
) -> str:
    ways = f"KL {before.kl:.4f} → {after.kl:.4f}, cross-entropy {before.cross_entropy:.4f} → {after.cross_entropy:.4f}"
    match effect:
        case "helps":
            entropy = (
                "; the student's cross-entropy was no worse than the teacher's"
                if cross_entropy[0] is None
                else f" and {cross_entropy[0]:.1f} % of the cross-entropy gap{_within(cross_entropy[1])}"
            )
            controls = "" if control[0] is None else f" A random change of the same size: {_percent(control)}."
            controls += "" if temperature[0] is None else f" One temperature on its logits: {_percent(temperature)}."
            of_kl = f"{kl[0]:.1f} % of the KL gap to the teacher{_within(kl[1])}"
            return f"Closes {of_kl}{entropy}: {ways}.{controls}"
        case "recalibrates":
            return (
                f"No more than recalibration: closes {_percent(kl)} of the KL gap, one temperature on the untouched "
                f"student's logits {_percent(temperature)} ({ways})."
            )
        case "mixed":
            return f"No transfer: KL falls but cross-entropy rises ({ways})."
        case "harms":
            return f"Harms the student: {ways}."
        case "none" if before == after:
            return f"The adapter changes nothing: nothing was transferred ({ways})."
        case "none":
            return f"No effect: {ways}."
        case "unproven":
            return f"Not proven on so little text: {ways}. Give more held-out text, or more of it (--tokens)."


def _percent(gap: _Gap) -> str:
    value, interval = gap
    return "unknown" if value is None else f"{value:.1f} %{_within(interval)}"


def _within(interval: Interval | None) -> str:
    return "" if interval is None else f" (95 %: {interval.low:.1f} to {interval.high:.1f})"
