"""The exact interval of a paired change, against every possible outcome."""

from __future__ import annotations

from math import comb, factorial

import numpy as np
import pytest

from moe_svd_distill.evaluation.code.paired import paired_change, score_statistic

PROBLEMS = 12


def _chance(gained: int, lost: int, gain: float, loss: float, problems: int = PROBLEMS) -> float:
    same = problems - gained - lost
    ways = factorial(problems) // (factorial(gained) * factorial(lost) * factorial(same))
    return float(ways * gain**gained * loss**lost * (1 - gain - loss) ** same)


def _outcomes(problems: int = PROBLEMS) -> list[tuple[int, int]]:
    return [(gained, lost) for gained in range(problems + 1) for lost in range(problems + 1 - gained)]


@pytest.fixture(scope="module")
def intervals() -> dict[tuple[int, int], tuple[float, float]]:
    found = {outcome: paired_change(PROBLEMS, *outcome) for outcome in _outcomes()}
    return {outcome: (change.low, change.high) for outcome, change in found.items()}


@pytest.mark.parametrize("changing", [0.02, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("gains", [0.0, 0.2, 0.5, 0.63, 0.9, 1.0])
def test_it_covers_the_truth_at_least_as_often_as_it_says(
    changing: float, gains: float, intervals: dict[tuple[int, int], tuple[float, float]]
) -> None:
    gain, loss = changing * gains, changing * (1 - gains)
    covered = sum(
        _chance(*outcome, gain, loss) for outcome, (low, high) in intervals.items() if low <= gain - loss <= high
    )
    assert covered >= 0.95 - 1e-3


@pytest.mark.parametrize(("gained", "lost"), [(3, 1), (0, 0), (5, 0), (2, 6)])
def test_its_ends_are_where_the_tail_is_a_fortieth(
    gained: int, lost: int, intervals: dict[tuple[int, int], tuple[float, float]]
) -> None:
    _, high = intervals[gained, lost]

    def tail(difference: float) -> float:
        """The largest chance of an outcome at least as low, over a fine grid of the nuisance, in plain sums."""
        found = _statistic(gained, lost, difference)
        low = [outcome for outcome in _outcomes() if _statistic(*outcome, difference) <= found + 1e-9]
        shares = np.linspace(max(0.0, -difference), (1 - difference) / 2, 400)
        return max(sum(_chance(*outcome, share + difference, share) for outcome in low) for share in shares)

    assert tail(high - 0.01) > 0.025
    assert tail(min(high + 0.01, 1.0)) < 0.026


def _statistic(gained: int, lost: int, difference: float) -> float:
    """The score of paired shares with its nuisance found by trying all values."""
    shares = np.linspace(max(0.0, -difference), (1 - difference) / 2, 20_001)[1:-1]
    same = PROBLEMS - gained - lost
    likelihood = (
        gained * np.log(shares + difference) + lost * np.log(shares) + same * np.log(1 - 2 * shares - difference)
    )
    best = shares[np.argmax(likelihood)]
    variance = PROBLEMS * (2 * best + difference - difference**2)
    return float((gained - lost - PROBLEMS * difference) / np.sqrt(variance))


@pytest.mark.parametrize(("gained", "lost", "difference"), [(3, 1, 0.4), (2, 6, -0.1), (5, 3, 0.05)])
def test_the_statistic_has_the_likeliest_nuisance(gained: int, lost: int, difference: float) -> None:
    (found,) = score_statistic(PROBLEMS, np.array([float(gained)]), np.array([float(lost)]), difference)
    assert found == pytest.approx(_statistic(gained, lost, difference), rel=1e-3)


def test_exchanging_before_and_after_turns_it_round() -> None:
    there, back = paired_change(40, 7, 2), paired_change(40, 2, 7)
    assert (back.change, back.low, back.high) == pytest.approx((-there.change, -there.high, -there.low))
    assert back.p_value == there.p_value
    assert there.low < there.change < there.high


@pytest.mark.parametrize(("gained", "lost"), [(5, 3), (9, 1), (0, 6), (1, 0)])
def test_the_test_is_that_of_fair_coins(gained: int, lost: int) -> None:
    changed = gained + lost
    outer = [k for k in range(changed + 1) if abs(2 * k - changed) >= abs(gained - lost)]
    assert paired_change(164, gained, lost).p_value == pytest.approx(sum(comb(changed, k) for k in outer) / 2**changed)


def test_no_change_of_many_problems_is_narrower_than_of_few() -> None:
    few, many = paired_change(10, 0, 0), paired_change(100, 0, 0)
    assert few.p_value == 1.0
    assert 0 < many.high < few.high < 1
    assert many.low == -many.high


@pytest.mark.parametrize("counts", [(0, 0, 0), (3, 2, 2), (3, -1, 0)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="of"):
        paired_change(*counts)
