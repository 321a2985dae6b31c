"""The guard's error rates on documents as they were measured; benchmarks/guard.py has the whole table."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from benchmarks.guard import Truth, simulate

RUNS = 150
BEYOND_CHANCE = 1e-3


def _at_most(rate: float, found: int) -> bool:
    """Whether so many of the runs are no proof of a higher rate."""
    return bool(binom.sf(found - 1, RUNS, rate) > BEYOND_CHANCE)


@pytest.mark.parametrize("truth", [Truth(0.0, flat=True), Truth(-0.05), Truth(0.05, cross_entropy=-0.5)])
def test_what_does_not_help_is_kept_less_than_once_in_200_times(truth: Truth) -> None:
    row = simulate(truth, "heavy", 12, RUNS)
    assert _at_most(1 / 200, round(row.kept * RUNS))


@pytest.mark.parametrize("lengths", ["heavy", "half"])
def test_what_closes_5_percent_is_lost_less_than_once_in_50_times(lengths: str) -> None:
    row = simulate(Truth(0.05), lengths, 20, RUNS)
    assert _at_most(1 / 50, round((1 - row.kept) * RUNS))


def test_short_evidence_is_never_called_harm() -> None:
    row = simulate(Truth(0.02), "half", 8, RUNS)
    assert row.unproven > 0.2
    assert _at_most(1 / 200, round((row.harm + row.none) * RUNS))
