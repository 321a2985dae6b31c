"""What the figures say, in one word and in one sentence."""

from __future__ import annotations

from typing import Literal, TypeAlias

from moe_svd_distill.evaluation.figures import Figures, Interval, Measurement, cross_entropy_change, kl_change

Effect: TypeAlias = Literal["helps", "mixed", "harms", "none"]

ERRORS = 3.0


def effect_of(before: Measurement, after: Measurement, errors: float = ERRORS) -> Effect:
    """Judge by paired changes over documents, beyond `errors` standard errors.

    `mixed` is KL that falls while cross-entropy rises, which is no transfer.
    """
    kl, entropy = kl_change(before, after), cross_entropy_change(before, after)
    if kl.rises(errors):
        return "harms"
    if not kl.falls(errors):
        return "harms" if entropy.rises(errors) else "none"
    return "mixed" if entropy.rises(1.0) else "helps"


def sentence(
    effect: Effect,
    kl_gap: float | None,
    kl_interval: Interval | None,
    cross_entropy_gap: float | None,
    control_gap: float | None,
    before: Figures,
    after: Figures,
) -> str:
    """Say it to the user, with the figures it rests on."""
    ways = f"KL {before.kl:.4f} → {after.kl:.4f}, cross-entropy {before.cross_entropy:.4f} → {after.cross_entropy:.4f}"
    within = "" if kl_interval is None else f" (95 %: {kl_interval.low:.1f} to {kl_interval.high:.1f})"
    match effect:
        case "helps":
            entropy = (
                "; the student's cross-entropy was no worse than the teacher's"
                if cross_entropy_gap is None
                else f" and {cross_entropy_gap:.1f} % of the cross-entropy gap"
            )
            control = "" if control_gap is None else f" A random change of the same size: {control_gap:.1f} %."
            return f"Closes {kl_gap:.1f} % of the KL gap to the teacher{within}{entropy}: {ways}.{control}"
        case "mixed":
            return f"No transfer: KL falls but cross-entropy rises ({ways})."
        case "harms":
            return f"Harms the student: {ways}."
        case "none" if before == after:
            return f"The adapter changes nothing: nothing was transferred ({ways})."
        case "none":
            return f"No measurable effect: {ways}."
