"""Figures of a model on text, with the uncertainty that comes from having read only some documents.

Everything is in nats per predicted token. Standard errors and intervals treat documents, not tokens, as independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """A model's means over all predicted tokens, each with its standard error over documents.

    Attributes:
        kl: KL(teacher ‖ student).
        cross_entropy: Of the text itself.
        top1_agreement: Share of tokens for which teacher and student put the same token first.
        tokens: Predicted tokens.
        documents: Independent units behind the standard errors.
        kl_interval: 95 % bootstrap interval over documents (see `bootstrap`); None where none was drawn.
        cross_entropy_interval: The same.
    """

    kl: float
    cross_entropy: float
    top1_agreement: float
    tokens: int
    documents: int
    kl_error: float
    cross_entropy_error: float
    top1_agreement_error: float
    kl_interval: Interval | None = None
    cross_entropy_interval: Interval | None = None

    derived: ClassVar[tuple[str, ...]] = ("perplexity",)

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy)."""
        return float(np.exp(self.cross_entropy))


@dataclass(frozen=True, eq=False)
class Measurement:
    """Sums per document, each (documents,): the raw material of every figure.

    Two measurements of the same text have the same documents in the same order, so that they can be paired.
    """

    kl: FloatArray
    cross_entropy: FloatArray
    agreement: FloatArray
    tokens: FloatArray

    @classmethod
    def of_tokens(cls, columns: FloatArray, units: NDArray[np.int64]) -> Measurement:
        """Sum up single tokens.

        Args:
            columns: KL, cross-entropy and agreement of each, (3, tokens).
            units: The document of each, (tokens,), numbered without gaps.
        """
        kl, cross_entropy, agreement = (np.bincount(units, column).astype(np.float64) for column in columns)
        return cls(kl, cross_entropy, agreement, np.bincount(units).astype(np.float64))

    @property
    def figures(self) -> Figures:
        """Means and standard errors."""
        kl, kl_error = mean_and_error(self.kl, self.tokens)
        cross_entropy, cross_entropy_error = mean_and_error(self.cross_entropy, self.tokens)
        agreement, agreement_error = mean_and_error(self.agreement, self.tokens)
        return Figures(
            kl=kl,
            cross_entropy=cross_entropy,
            top1_agreement=agreement,
            tokens=int(self.tokens.sum()),
            documents=len(self.tokens),
            kl_error=kl_error,
            cross_entropy_error=cross_entropy_error,
            top1_agreement_error=agreement_error,
        )

    def of(self, documents: NDArray[np.int64]) -> Measurement:
        """The same for some documents, given by index."""
        return Measurement(
            self.kl[documents], self.cross_entropy[documents], self.agreement[documents], self.tokens[documents]
        )


def mean_and_error(sums: FloatArray, counts: FloatArray) -> tuple[float, float]:
    """Mean per token and its standard error over documents of unequal length; not a number with a single document.

    The error is that of a ratio estimator: sqrt(D/(D-1) · Σ(s_d − m·n_d)²) / Σn_d.
    """
    total = counts.sum()
    mean = float(sums.sum() / total)
    documents = len(counts)
    if documents < 2:
        return mean, float("nan")
    spread = ((sums - mean * counts) ** 2).sum() * documents / (documents - 1)
    return mean, float(np.sqrt(spread) / total)


def halves(tokens: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide documents into two halves of about as many tokens, by index: each, largest first, to the lighter half."""
    chosen: tuple[list[int], list[int]] = ([], [])
    weight = [0.0, 0.0]
    for document in np.argsort(-tokens, kind="stable"):
        lighter = int(weight[1] < weight[0])
        chosen[lighter].append(int(document))
        weight[lighter] += float(tokens[document])
    first, second = (np.asarray(sorted(half), dtype=np.int64) for half in chosen)
    return first, second


NO_GAP = 1e-6
"""Nats per token: a gap below this is rounding."""


def kl_gap_closed(before: float, after: float) -> float | None:
    """Percent of the way to the teacher's distribution; None if there is no gap."""
    return 100.0 * (before - after) / before if before > NO_GAP else None


def cross_entropy_gap_closed(before: float, after: float, teacher: float) -> float | None:
    """Percent of the way to the teacher's cross-entropy; None if the student is not behind the teacher."""
    return 100.0 * (before - after) / (before - teacher) if before - teacher > NO_GAP else None
