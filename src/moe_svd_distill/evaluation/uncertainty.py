"""How far a figure fell on the same documents, and how far that is to be trusted: by paired changes, and by bootstrap.

Every document says how far its own figure fell, in nats per token; their weighted mean is the fall, and its error is
that of the mean over documents, by Student's distribution. A long document says little more than a middling one, so
n tokens weigh n / (n + 256): at about that length documents differ as much by what they are as by the luck of their
tokens. A fall far above all others counts no more than the highest that is not: one document must not carry a verdict.

95 % intervals are by the bootstrap: documents are drawn with replacement, and every figure is taken over again. All
figures of one bootstrap rest on the same draws, so that what two measurements have in common cancels in their
difference. Percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_svd_distill.algebra.figures import (
    Figures,
    FloatArray,
    Interval,
    Measurement,
    cross_entropy_gap_closed,
    kl_gap_closed,
)

_HALF_WEIGHT_TOKENS = 256.0
"""Measured on the lab's pairs: 225 to 350 for KL, 385 to 670 for cross-entropy (docs/decisions/0024)."""
_FEWEST_FOR_FENCE = 4
_FENCE = 1.5  # interquartile ranges above the upper quartile: Tukey's fence
_SLACK = 1.0  # standard errors: text is asked for that would do in five of six cases, not in every other
RESAMPLES = 2000
_PERCENT = (2.5, 97.5)
_MOSTLY = 0.99  # share of draws in which a gap must exist for the part closed of it to mean anything


@dataclass(frozen=True)
class Change:
    """How far a figure fell, in nats per token; above 0 is better.

    Attributes:
        fall: The weighted mean over documents.
        error: Its standard error.
        freedom: Degrees of freedom: documents of equal weight that would say as much, less one.
        before: The figure before, with the same weights.
        documents: Documents that were paired.
        lower: In how many of them it fell.
    """

    fall: float
    error: float
    freedom: float
    before: float
    documents: int
    lower: int

    def falls(self, errors: float) -> bool:
        """Whether it falls beyond so many standard errors, as `margin` reckons them."""
        return self.fall > self.margin(errors)

    def margin(self, errors: float) -> float:
        """As unlikely by chance as `errors` standard errors of a normal distribution; infinite for a single document.

        With few documents that is more errors: Student's distribution, which makes 3 into 4.1 with 10 documents.
        """
        if not self.freedom > 0:
            return math.inf
        from scipy.special import ndtr, stdtrit

        return float(stdtrit(self.freedom, float(ndtr(errors)))) * self.error

    def share(self, fall: float) -> float:
        """A fall as a share of the figure before; 0 where there is nothing that could fall."""
        return fall / self.before if self.before > 0 else 0.0


def kl_change(before: Measurement, after: Measurement) -> Change:
    """By how much KL fell; to ask by how much it rose, give the two the other way round."""
    return paired_change(before.kl, after.kl, before.tokens)


def cross_entropy_change(before: Measurement, after: Measurement) -> Change:
    """By how much cross-entropy fell; to ask by how much it rose, give the two the other way round."""
    return paired_change(before.cross_entropy, after.cross_entropy, before.tokens)


def paired_change(before: FloatArray, after: FloatArray, tokens: FloatArray) -> Change:
    """The change between sums over the same documents.

    Args:
        before: Sum over each document's tokens, (documents,).
        after: The same after the change.
        tokens: Of each document, (documents,).
    """
    read = tokens > 0
    before, after, tokens = before[read], after[read], tokens[read]
    weights = tokens / (tokens + _HALF_WEIGHT_TOKENS)
    weights = weights / weights.sum()
    own = (before - after) / tokens
    falls = np.minimum(own, _fence(own))
    fall, squares = float((weights * falls).sum()), float((weights**2).sum())
    spread = float((weights**2 * (falls - fall) ** 2).sum())
    alone = len(tokens) < 2
    return Change(
        fall=fall,
        error=math.nan if alone else math.sqrt(spread / (1 - squares)),
        freedom=0.0 if alone else 1 / squares - 1,
        before=float((weights * before / tokens).sum()),
        documents=len(tokens),
        lower=int((own > 0).sum()),
    )


def tokens_needed(change: Change, errors: float, band: float, tokens: int) -> int | None:
    """Text on which this change would be proven a fall, or one of less than `band`, whichever takes less.

    The error shrinks with the root of the text. At least twice the text there is, in whole 1,024 tokens; None where no
    amount says more.

    Args:
        change: What was seen.
        errors: Standard errors that are asked for.
        band: Falls below this share of the figure before do not count.
        tokens: The text it was seen on.
    """
    distances = (change.fall, band * change.before - change.fall)
    margin = change.margin(errors) + _SLACK * change.error
    ways = [(margin / distance) ** 2 for distance in distances if distance > 0]
    if not ways or not math.isfinite(margin):
        return None
    return 1024 * math.ceil(tokens * max(2.0, min(ways)) / 1024)


def _fence(falls: FloatArray) -> float:
    """Above this a fall is far from all others; infinite with too few documents to say so."""
    if len(falls) < _FEWEST_FOR_FENCE:
        return math.inf
    low, high = np.quantile(falls, (0.25, 0.75))
    return float(high + _FENCE * (high - low))


class Bootstrap:
    """The draws over one set of documents.

    Args:
        documents: How many there are; with a single one there are no intervals.
        seed: Of the draws.
        resamples: How many draws.
    """

    def __init__(self, documents: int, *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self._drawn: FloatArray | None = None
        if documents > 1:
            even = np.full(documents, 1.0 / documents)
            self._drawn = np.random.default_rng(seed).multinomial(documents, even, size=resamples).astype(np.float64)

    def figures(self, measurement: Measurement) -> Figures:
        """The figures of a measurement with the intervals of KL and cross-entropy, in nats per token."""
        return replace(
            measurement.figures,
            kl_interval=self._ratio(measurement.kl, measurement.tokens),
            cross_entropy_interval=self._ratio(measurement.cross_entropy, measurement.tokens),
        )

    def gaps(
        self, before: Measurement, after: Measurement, teacher: Measurement
    ) -> tuple[Interval | None, Interval | None]:
        """The KL and the cross-entropy gap closed, in percent; None for a gap that more than a few draws lack."""
        return (
            self._ratio(before.kl - after.kl, before.kl, 100.0),
            self._ratio(
                before.cross_entropy - after.cross_entropy, before.cross_entropy - teacher.cross_entropy, 100.0
            ),
        )

    def kl_fall(self, before: Measurement, after: Measurement) -> Interval | None:
        """By how much KL is lower in the second measurement, in nats per token."""
        return self._ratio(before.kl - after.kl, before.tokens)

    def _ratio(self, over: FloatArray, under: FloatArray, unit: float = 1.0) -> Interval | None:
        if self._drawn is None:
            return None
        above, below = self._drawn @ over, self._drawn @ under
        defined = below > 0
        if defined.mean() < _MOSTLY:
            return None
        low, high = np.percentile(unit * above[defined] / below[defined], _PERCENT)
        return Interval(float(low), float(high))


@dataclass(frozen=True)
class GapClosed:
    """Percent of the way from the untouched student to the teacher; None where it is not certain to be behind.

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


def gap_between(before: Measurement, after: Measurement, teacher: Measurement, bootstrap: Bootstrap) -> GapClosed:
    """The gap that is closed from one measurement to another, with its intervals.

    A share of a gap that may be none is no figure, as large as it comes out: there is one only where the bootstrap has
    an interval. Of a single document, which has none, KL is still a gap, because it is never below 0.
    """
    old, new = before.figures, after.figures
    kl_interval, entropy_interval = bootstrap.gaps(before, after, teacher)
    kl = kl_gap_closed(old.kl, new.kl)
    entropy = cross_entropy_gap_closed(old.cross_entropy, new.cross_entropy, teacher.figures.cross_entropy)
    if kl_interval is None and len(before.tokens) > 1:
        kl = None
    if entropy_interval is None:
        entropy = None
    return GapClosed(kl, entropy, None if kl is None else kl_interval, None if entropy is None else entropy_interval)


def mean_gap(gaps: Sequence[GapClosed]) -> GapClosed:
    """The mean of several, without intervals unless there is only one."""
    if len(gaps) == 1:
        return gaps[0]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    return GapClosed(mean([gap.kl for gap in gaps]), mean([gap.cross_entropy for gap in gaps]))
