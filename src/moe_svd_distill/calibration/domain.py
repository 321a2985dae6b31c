"""How far one text is from another, against how far a text is from itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Real
from numpy.typing import NDArray

from moe_svd_distill.calibration.text import TokenizedText, even_share
from moe_svd_distill.calibration.tokenizer import IntArray

FAR = 1.5
"""A text counts as another domain beyond this many times the distance within: see `domain_distance`."""

_DRAWS = 20  # random halves
_FEWEST_BLOCKS = 16
_BLOCK = 64


@dataclass(frozen=True)
class DomainDistance:
    """How far text b is from text a, in bits of Jensen–Shannon divergence between token frequencies (0 … 1).

    Attributes:
        distance: Between samples of a and samples of b, mean.
        within: Between samples of a, halves that share no document, mean.
        different: Whether b is of another domain: half of its samples are farther from a than 95 % of a's halves are
            from one another, and the mean is more than `FAR` times theirs.
        tokens: Tokens of each sample; the divergence of two samples falls with their size, so all have the same.
    """

    distance: float
    within: float
    different: bool
    tokens: int

    derived: ClassVar[tuple[str, ...]] = ("ratio",)

    @property
    def ratio(self) -> float:
        """Times the distance within."""
        return self.distance / self.within if self.within > 0 else (1.0 if self.distance == 0 else float("inf"))


def domain_distance(a: TokenizedText, b: TokenizedText, *, seed: int = 0) -> DomainDistance:
    """Compare which tokens two texts use, as far as the spread between documents of `a` lets one tell.

    Documents of a are halved at random; the halves are compared with one another and with as many tokens of b's, each
    sample taken evenly from all of its documents. The divergence is that of unigram counts (Lin 1991, "Divergence
    measures based on the Shannon entropy"): it sees topics, languages and code, and neither style nor order.

    Args:
        a: The text that something was fitted on.
        b: Text in the same tokenizer's tokens.
        seed: Of the halves.
    """
    rng = np.random.default_rng(seed)
    blocks_a, blocks_b = _blocks(a), _blocks(b)
    splits = [_halves(blocks_a, rng) for _ in range(_DRAWS)]
    size = min(sum(map(len, sample)) for sample in (*(half for halves in splits for half in halves), blocks_b))
    vocabulary = int(max(block.max() for block in (*blocks_a, *blocks_b))) + 1
    within, distance = [], []
    for halves in splits:
        first, second = (np.bincount(_sample(half, size, rng), minlength=vocabulary) for half in halves)
        other = np.bincount(_sample(blocks_b, size, rng), minlength=vocabulary)
        within.append(jensen_shannon(first, second))
        distance.append((jensen_shannon(first, other) + jensen_shannon(second, other)) / 2)
    usual, unusual = float(np.mean(within)), float(np.quantile(within, 0.95))
    found = float(np.mean(distance))
    return DomainDistance(found, usual, bool(np.median(distance) > unusual and found > FAR * usual), size)


def jensen_shannon(p: Real[np.ndarray, "v"], q: Real[np.ndarray, "v"]) -> float:
    """Jensen–Shannon divergence of two vectors of counts or frequencies, in bits, from 0 to 1."""
    first, second = np.asarray(p, dtype=np.float64) / p.sum(), np.asarray(q, dtype=np.float64) / q.sum()
    middle = (first + second) / 2
    return (_divergence(first, middle) + _divergence(second, middle)) / 2


def _divergence(p: NDArray[np.float64], middle: NDArray[np.float64]) -> float:
    there = p > 0
    return float((p[there] * np.log2(p[there] / middle[there])).sum())


def _blocks(text: TokenizedText) -> list[IntArray]:
    """The tokens document by document, or in short stretches where there are too few documents to draw from."""
    real = text.document_of_token.reshape(-1) >= 0
    tokens, owners = text.sequences.reshape(-1)[real], text.document_of_token.reshape(-1)[real]
    if len(text.sources) < _FEWEST_BLOCKS:
        return np.array_split(tokens, max(min(len(tokens) // _BLOCK, 4 * _FEWEST_BLOCKS), 2))
    return np.split(tokens, np.flatnonzero(np.diff(owners)) + 1)


def _halves(blocks: list[IntArray], rng: np.random.Generator) -> tuple[list[IntArray], list[IntArray]]:
    """Divide blocks at random into two lists of about as many tokens, neither empty."""
    order = [blocks[place] for place in rng.permutation(len(blocks))]
    reached = np.cumsum([len(block) for block in order])
    cut = min(max(int(np.searchsorted(reached, reached[-1] / 2)), 1), len(blocks) - 1)
    return order[:cut], order[cut:]


def _sample(blocks: list[IntArray], size: int, rng: np.random.Generator) -> IntArray:
    """Take `size` tokens, as many from every block as it has up to an even share, from a random place in it."""
    share = even_share([len(block) for block in blocks], size)
    begins = [int(rng.integers(0, max(len(block) - share, 0) + 1)) for block in blocks]
    return np.concatenate([block[begin : begin + share] for block, begin in zip(blocks, begins, strict=True)])[:size]
