"""95 % intervals by the bootstrap: documents are drawn with replacement, and every figure is taken over again.

All figures of one bootstrap rest on the same draws, so that what two measurements have in common cancels in their
difference. Percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moe_svd_distill.algebra.figures import Figures, FloatArray, Interval, Measurement

RESAMPLES = 2000
_PERCENT = (2.5, 97.5)
_MOSTLY = 0.99  # share of draws in which a gap must exist for the part closed of it to mean anything


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
