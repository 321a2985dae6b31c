"""Whether an adapter is kept: what must be proven, and what is said where it is not.

KL is convex in the scale of an adapter (nearly so, where more than the head changes): what does not help at a small
scale helps at no larger one. So the scales are tested from the smallest up, each at full certainty, and the first
that is not proven ends it: however many scales are tried, a useless adapter has one chance (a fixed-sequence test).
Where two neighbouring scales are proven and the larger is worth more, smaller ones are not tried: they would pass too.
A useless adapter is kept less than once in 200 times, one that closes 5 % of KL lost less than once in 50 with twelve
documents or more (docs/decisions/0024, measured).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from moe_svd_distill.algebra.figures import NO_GAP, Measurement
from moe_svd_distill.evaluation.uncertainty import Change, cross_entropy_change, kl_change, tokens_needed

Kind: TypeAlias = Literal["kept", "harm", "none", "unproven"]
"""What was found: a fall; a rise of KL or cross-entropy; no fall that counts; or too little text to tell."""

_NOTHING = "Nothing was transferred: "


# What an adapter must do, on text that nothing else was chosen by, to be kept.
ERRORS = 2.6
"""KL must fall by more than so many standard errors (see `Change.margin`), which is passed by chance once in 215 times.
Of a rise of KL or of cross-entropy twice as little chance is asked, as there are two."""
CROSS_ENTROPY_ERRORS = 1.0
"""Cross-entropy must fall as well, by more than so many of its own."""
SHARE = 0.02
"""A fall that is certainly less than this share of KL does not count."""


def errors_of(tries: int) -> float:
    """Standard errors asked of each of several tries, so that together they have the chance of one (Bonferroni)."""
    from scipy.special import ndtr, ndtri

    return float(-ndtri(ndtr(-ERRORS) / tries))


@dataclass(frozen=True)
class TrialFigures:
    """A setting's figures and what fell beside the untouched student, in nats per token, with errors over documents."""

    scales: Mapping[str, float]
    kl: float
    cross_entropy: float
    kl_fall: float
    kl_fall_error: float
    cross_entropy_fall: float
    cross_entropy_fall_error: float
    documents: int


@dataclass(frozen=True, eq=False)
class Trial:
    """A setting beside the untouched student.

    Attributes:
        scales: Scale of each group.
        before: The untouched student.
        after: The student at these scales, on the same documents.
    """

    scales: Mapping[str, float]
    before: Measurement
    after: Measurement

    @cached_property
    def kl(self) -> Change:
        """The fall of KL."""
        return kl_change(self.before, self.after)

    @cached_property
    def cross_entropy(self) -> Change:
        """The fall of cross-entropy."""
        return cross_entropy_change(self.before, self.after)

    @cached_property
    def kl_rise(self) -> Change:
        """The fall with the sign turned, except where single documents are far from all others."""
        return kl_change(self.after, self.before)

    @cached_property
    def cross_entropy_rise(self) -> Change:
        """The same of cross-entropy."""
        return cross_entropy_change(self.after, self.before)

    @property
    def figures(self) -> TrialFigures:
        """What is kept of it."""
        tokens = self.after.tokens.sum()
        return TrialFigures(
            scales=self.scales,
            kl=float(self.after.kl.sum() / tokens),
            cross_entropy=float(self.after.cross_entropy.sum() / tokens),
            kl_fall=self.kl.fall,
            kl_fall_error=self.kl.error,
            cross_entropy_fall=self.cross_entropy.fall,
            cross_entropy_fall_error=self.cross_entropy.error,
            documents=self.kl.documents,
        )

    def counts(self, tries: int = 1) -> bool:
        """Whether it is proven to help: KL falls, not certainly by too little, and cross-entropy with it."""
        enough = self.most >= SHARE
        return enough and self.kl.falls(errors_of(tries)) and self.cross_entropy.falls(CROSS_ENTROPY_ERRORS)

    def harms(self) -> bool:
        """Whether KL or cross-entropy measurably rises."""
        return self.kl_rise.falls(errors_of(2)) or self.cross_entropy_rise.falls(errors_of(2))

    @property
    def most(self) -> float:
        """The largest share of KL by which it may fall."""
        return self.kl.share(self.kl.fall + self.kl.margin(ERRORS))


def kind_of(trials: Sequence[Trial]) -> Literal["harm", "none", "unproven"]:
    """What to call an adapter that is not kept.

    Harm and no effect are claims and need their proof: KL can fall nowhere by a share that counts; or wherever it was
    proven to fall, cross-entropy measurably rises. Everything else is not proven.

    Args:
        trials: All that was tried, at least one setting.
    """
    if trials[0].kl.before < NO_GAP:
        return "harm" if any(trial.harms() for trial in trials) else "none"
    hopeful = [trial for trial in trials if trial.most >= SHARE]
    if not hopeful:
        return "harm" if any(trial.harms() for trial in trials) else "none"
    falling = [trial for trial in hopeful if trial.kl.falls(ERRORS)]
    if falling and all(trial.cross_entropy_rise.falls(errors_of(2)) for trial in falling):
        return "harm"
    return "unproven"


def kept_sentence(kept: Trial) -> str:
    """Say what is kept, with the figures it rests on."""
    scales = ", ".join(f"{scale:g} ({group})" for group, scale in kept.scales.items())
    kl, entropy = kept.kl, kept.cross_entropy
    return (
        f"Kept at scale {scales}: on text that nothing was fitted on, KL falls by {kl.share(kl.fall):.1%} "
        f"({kl.fall:.4f} ± {kl.error:.4f} nats per token, in {kl.lower} of {kl.documents} documents) "
        f"and cross-entropy by {entropy.fall:.4f} ± {entropy.error:.4f}."
    )


def refusal(kind: Kind, trials: Sequence[Trial], tokens: int) -> tuple[str, int | None]:
    """Say why nothing is kept and what to do about it, and how much search text would settle it.

    Args:
        kind: From `kind_of`.
        trials: All that was tried, at least one setting.
        tokens: The text it was tried on.
    """
    if kind == "harm":
        harmful = max(trials, key=lambda trial: (trial.harms(), -trial.kl.fall))
        return f"{_NOTHING}the adapter harms: {_figures(harmful)}.", None
    if kind == "none":
        best = max(trials, key=lambda trial: trial.most)
        if best.kl.before < NO_GAP:
            return f"{_NOTHING}the student agrees with the teacher already.", None
        return (
            f"{_NOTHING}no effect that counts: {_figures(best)}, less than the {SHARE:.0%} that would.",
            None,
        )
    best = max(trials, key=lambda trial: trial.kl.fall / trial.kl.error if trial.kl.error > 0 else 0.0)
    needed = tokens_needed(best.kl, ERRORS, SHARE, tokens)
    if best.kl.falls(ERRORS):
        needed = tokens_needed(best.cross_entropy, CROSS_ENTROPY_ERRORS, 0.0, tokens)
    advice = f"Give more text, or --scale-search-tokens {needed}" if needed else "Give text of more documents"
    return (
        f"{_NOTHING}not proven on so little text: {_figures(best)}. {advice}; what was computed is kept.",
        needed,
    )


def _figures(trial: Trial) -> str:
    """A setting's figures and the interval they are judged by."""
    kl, entropy, scales = trial.kl, trial.cross_entropy, set(trial.scales.values())
    named = f"{scales.pop():g}" if len(scales) == 1 else ", ".join(f"{g} {s:g}" for g, s in trial.scales.items())
    sign = 1 if kl.fall >= 0 else -1
    low, high = sorted(sign * kl.share(kl.fall + side * kl.margin(ERRORS)) for side in (-1, 1))
    within = f"{low:+.1%} to {high:+.1%}, lower in {kl.lower} of {kl.documents} documents"
    return (
        f"at scale {named} KL {_moves(kl)} by {abs(kl.share(kl.fall)):.1%} ({within}) and "
        f"cross-entropy {_moves(entropy)} by {abs(entropy.fall):.4f} ± {entropy.error:.4f} nats per token"
    )


def _moves(change: Change) -> str:
    return "falls" if change.fall >= 0 else "rises"
