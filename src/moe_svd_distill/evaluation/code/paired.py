"""Two shares over the same problems: the exact test and the exact interval of their difference.

Of n problems `gained` pass only after, `lost` only before. McNemar's exact test asks whether gains among the problems
that changed could be fair coin tosses. The interval is the exact unconditional one (Chan and Zhang, Biometrics 55,
1999) with the score statistic of paired shares (Tango, Statistics in Medicine 17, 1998): the differences that no
share of lost problems, the nuisance, makes as unlikely as the outcome is. It does not take the number of changed
problems as given, as an interval of the share of gains among them would (decision 0026).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy
from scipy.stats import binomtest

from moe_svd_distill.evaluation.code.result import PairedChange

FloatArray: TypeAlias = NDArray[np.float64]

CONFIDENCE = 0.95
_NUISANCE = 100  # shares of lost problems that are tried for each difference
_TOLERANCE = 1e-4
_EQUAL = 1e-9  # outcomes whose statistics differ by rounding only are as extreme as one another


def paired_change(problems: int, gained: int, lost: int) -> PairedChange:
    """Compare two shares over the same problems.

    Args:
        problems: How many there are, at least one.
        gained: Those that pass only after.
        lost: Those that pass only before.
    """
    if problems < 1 or min(gained, lost) < 0 or gained + lost > problems:
        raise ValueError(f"{gained} gained and {lost} lost of {problems} problems")
    changed = gained + lost
    return PairedChange(
        change=(gained - lost) / problems,
        low=-_upper_end(problems, lost, gained),
        high=_upper_end(problems, gained, lost),
        p_value=float(binomtest(gained, changed).pvalue) if changed else 1.0,
    )


def score_statistic(problems: int, gained: FloatArray, lost: FloatArray, difference: float) -> FloatArray:
    """Tango's statistic: how far gained − lost lies from what `difference` leads to expect, in standard errors."""
    linear = (2 * problems - gained + lost) * difference - gained - lost
    constant = -lost * difference * (1 - difference)
    # The likeliest share of lost problems under `difference`: the larger root of 2n·q² + linear·q + constant.
    likeliest = (np.sqrt(np.maximum(linear**2 - 8 * problems * constant, 0.0)) - linear) / (4 * problems)
    variance = problems * (2 * likeliest + difference * (1 - difference))
    excess = gained - lost - problems * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(excess) < _EQUAL, 0.0, excess / np.sqrt(np.maximum(variance, 0.0)))


def _upper_end(problems: int, gained: int, lost: int) -> float:
    """The largest difference under which an outcome as low as this is not too unlikely, by bisection."""
    tail = (1 - CONFIDENCE) / 2
    all_gained, all_lost = (part.astype(np.float64) for part in np.nonzero(_possible(problems)))
    ways = gammaln(problems + 1) - gammaln(all_gained + 1) - gammaln(all_lost + 1)
    ways -= gammaln(problems - all_gained - all_lost + 1)
    low, high = (gained - lost) / problems, 1.0
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        statistic = score_statistic(problems, all_gained, all_lost, middle)
        (found,) = score_statistic(problems, np.array([float(gained)]), np.array([float(lost)]), middle)
        extreme = statistic <= found + _EQUAL
        chance = _largest_chance(problems, middle, all_gained[extreme], all_lost[extreme], ways[extreme])
        low, high = (middle, high) if chance > tail else (low, middle)
    return high


def _largest_chance(problems: int, difference: float, gained: FloatArray, lost: FloatArray, ways: FloatArray) -> float:
    """The chance of a set of outcomes under the share of lost problems that makes it largest."""
    shares = np.linspace(max(0.0, -difference), (1 - difference) / 2, _NUISANCE)
    same = problems - gained - lost
    chances = [
        np.exp(ways + xlogy(gained, q + difference) + xlogy(lost, q) + xlogy(same, max(0.0, 1 - 2 * q - difference)))
        for q in shares
    ]
    return max(float(chance.sum()) for chance in chances)


def _possible(problems: int) -> NDArray[np.bool_]:
    counts = np.arange(problems + 1)
    return counts[:, None] + counts[None, :] <= problems
