"""How far a figure fell, by documents of unequal length."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_svd_distill.algebra.figures import FloatArray, Measurement
from moe_svd_distill.evaluation.uncertainty import (
    Bootstrap,
    Change,
    GapClosed,
    gap_between,
    kl_change,
    paired_change,
    tokens_needed,
)


def _change(falls: list[float], tokens: list[float]) -> Change:
    """KL of 1 that falls by so much per token of each document."""
    counts = np.array(tokens)
    return paired_change(counts * 1.0, counts * (1 - np.array(falls)), counts)


def test_documents_of_one_length_give_the_mean_and_its_error() -> None:
    falls = [0.1, 0.2, 0.3, 0.4]
    change = _change(falls, [100.0] * 4)
    assert change.fall == pytest.approx(0.25)
    assert change.error == pytest.approx(np.std(falls, ddof=1) / 2)
    assert change.freedom == pytest.approx(3)
    assert (change.before, change.documents, change.lower) == (pytest.approx(1.0), 4, 4)
    assert change.share(change.fall) == pytest.approx(0.25)


def test_one_document_proves_nothing() -> None:
    alone = _change([0.9], [100.0])
    assert math.isnan(alone.error)
    assert not alone.falls(1)
    assert not _change([-0.9], [100.0]).falls(1)


def test_few_documents_ask_for_more_errors() -> None:
    assert Change(0.0, 1.0, 9, 1.0, 10, 5).margin(3) == pytest.approx(4.09, abs=0.01)
    assert Change(0.0, 1.0, 9999, 1.0, 10_000, 5000).margin(3) == pytest.approx(3, abs=0.01)


def test_a_document_of_half_the_tokens_is_not_half_of_the_verdict() -> None:
    tokens, falls = [3000.0, *[300.0] * 10], [-0.5, *[0.1] * 10]
    change = _change(falls, tokens)
    weights = np.array(tokens) / (np.array(tokens) + 256)
    assert change.fall == pytest.approx(float((weights * falls).sum() / weights.sum()))
    assert change.fall > 0 > (np.array(tokens) * falls).sum()
    assert change.freedom > 8
    assert change.lower == 10


def test_one_document_far_above_all_others_does_not_hide_what_they_say() -> None:
    """The near-duplicate of a text that was fitted on: its gain is eight times theirs."""
    falls = [0.05, 0.06, 0.04, 0.05, 0.07, 0.05, 0.06, 0.04, 0.05, 0.06, 0.05, 0.6]
    change = _change(falls, [300.0] * 12)
    assert change.falls(3)
    assert change.fall < 0.07 < np.mean(falls)
    alike = [-fall for fall in falls]
    assert _change(alike, [300.0] * 12).fall == pytest.approx(float(np.mean(alike)))


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(1, 5000)), min_size=2, max_size=30),
    st.floats(0.1, 10),
)
def test_the_unit_of_the_figure_does_not_matter(documents: list[tuple[float, float]], unit: float) -> None:
    falls, tokens = (np.array(values) for values in zip(*documents, strict=True))
    one = paired_change(tokens, tokens * (1 - falls), tokens)
    other = paired_change(tokens * unit, tokens * (1 - falls) * unit, tokens)
    assert other.fall == pytest.approx(unit * one.fall, abs=1e-9)
    assert other.error == pytest.approx(unit * one.error, abs=1e-9)
    assert 0 < one.freedom <= len(documents) - 1 + 1e-9
    assert one.fall <= (tokens / (tokens + 256) * falls).sum() / (tokens / (tokens + 256)).sum() + 1e-9


def test_pairing_sees_what_the_spread_between_documents_hides(rng: np.random.Generator) -> None:
    tokens = rng.integers(50, 150, 40).astype(float)
    kl = tokens * (1 + 0.5 * rng.standard_normal(40))
    before = Measurement(kl, kl, kl, tokens)
    after = Measurement(kl - tokens * (0.02 + 0.005 * rng.standard_normal(40)), kl, kl, tokens)
    change = kl_change(before, after)
    assert change.fall == pytest.approx(0.02, abs=0.003)
    assert change.falls(3)
    assert change.fall < before.figures.kl_error


def test_as_much_text_as_is_asked_for_settles_it(rng: np.random.Generator) -> None:
    """On text of the size that is named the same fall is proven in at least three of four draws."""
    seen = _change(list(0.05 + 0.1 * rng.standard_normal(12)), [340.0] * 12)
    seen = Change(0.05, 0.1 / math.sqrt(12), 11, 1.0, 12, 9)
    needed = tokens_needed(seen, 2.75, 0.02, 4096)
    assert needed is not None
    assert needed % 1024 == 0
    documents = needed // 340
    proven = sum(
        _change(list(0.05 + 0.1 * rng.standard_normal(documents)), [340.0] * documents).falls(2.75) for _ in range(200)
    )
    assert proven >= 150


def test_text_for_what_does_not_fall_is_that_which_shows_it() -> None:
    rising = Change(-0.01, 0.02, 11, 1.0, 12, 5)
    needed = tokens_needed(rising, 2.75, 0.02, 4096)
    assert needed is not None
    assert needed >= 2 * 4096
    assert tokens_needed(rising, 2.75, 0.0, 4096) is not None
    assert tokens_needed(Change(0.0, 0.02, 11, 0.0, 12, 5), 2.75, 0.02, 4096) is None
    assert tokens_needed(Change(0.1, math.nan, 0, 1.0, 1, 1), 2.75, 0.02, 512) is None


def _measured(kl: float, entropy: FloatArray) -> Measurement:
    tokens = np.full(len(entropy), 100.0)
    return Measurement(tokens * kl, tokens * entropy, tokens, tokens)


@pytest.mark.parametrize("ahead", [0.0001, 0.0, -0.0001])
def test_a_share_of_a_gap_that_may_be_none_is_no_figure(ahead: float, rng: np.random.Generator) -> None:
    entropy = 3 + 0.3 * rng.standard_normal(20)
    teacher, before = _measured(0, entropy), _measured(0.5, entropy + ahead + 0.05 * rng.standard_normal(20))
    after = _measured(0.4, before.cross_entropy / 100 - 0.02)
    gap = gap_between(before, after, teacher, Bootstrap(20))
    assert (gap.cross_entropy, gap.cross_entropy_interval) == (None, None)
    assert gap.kl == pytest.approx(20)
    clear = gap_between(_measured(0.5, entropy + 0.2), after, teacher, Bootstrap(20))
    assert clear.cross_entropy is not None
    assert clear.cross_entropy_interval is not None


def test_a_single_document_and_no_gap_at_all(rng: np.random.Generator) -> None:
    one = np.array([3.0])
    alone = gap_between(_measured(0.5, one + 0.2), _measured(0.4, one), _measured(0, one), Bootstrap(1))
    assert (alone.kl, alone.cross_entropy) == (pytest.approx(20), None)
    entropy = 3 + 0.3 * rng.standard_normal(20)
    rounding = gap_between(
        _measured(1e-8, entropy), _measured(2e-8, entropy), _measured(0, entropy - 1e-8), Bootstrap(20)
    )
    assert rounding == GapClosed(None, None)
