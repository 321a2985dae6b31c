"""Means, errors and gaps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_svd_distill.algebra.figures import (
    Interval,
    Measurement,
    cross_entropy_gap_closed,
    halves,
    kl_gap_closed,
    mean_and_error,
)
from moe_svd_distill.evaluation.result import Evaluation, effect_of
from moe_svd_distill.evaluation.uncertainty import Bootstrap, GapClosed
from moe_svd_distill.files.typed import as_json


def _measurement(kl: float, entropy: float, noise: float, rng: np.random.Generator, documents: int = 40) -> Measurement:
    tokens = rng.integers(50, 150, documents).astype(float)
    rng_kl, rng_entropy = (tokens * (value + noise * rng.standard_normal(documents)) for value in (kl, entropy))
    return Measurement(rng_kl, rng_entropy, 0.5 * tokens, tokens)


def _shifted(
    measurement: Measurement, kl: float, entropy: float, noise: float, rng: np.random.Generator
) -> Measurement:
    tokens = measurement.tokens
    return Measurement(
        measurement.kl + tokens * (kl + noise * rng.standard_normal(len(tokens))),
        measurement.cross_entropy + tokens * (entropy + noise * rng.standard_normal(len(tokens))),
        measurement.agreement,
        tokens,
    )


def test_the_error_is_that_of_the_mean(rng: np.random.Generator) -> None:
    means = []
    errors = []
    for _ in range(400):
        tokens = rng.integers(20, 200, 30).astype(float)
        mean, error = mean_and_error(tokens * (1 + 0.3 * rng.standard_normal(30)), tokens)
        means.append(mean)
        errors.append(error)
    assert np.mean(means) == pytest.approx(1.0, abs=0.02)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_one_document_has_no_error() -> None:
    assert math.isnan(mean_and_error(np.array([3.0]), np.array([2.0]))[1])


def test_halves_share_the_tokens_evenly() -> None:
    first, second = halves(np.array([100.0, 1, 1, 50, 49, 2]))
    assert sorted([*first, *second]) == list(range(6))
    assert {int(first.size), int(second.size)} <= {2, 3, 4}


def test_gaps() -> None:
    assert kl_gap_closed(0.5, 0.1) == pytest.approx(80)
    assert kl_gap_closed(0.0, 0.1) is None
    assert cross_entropy_gap_closed(4.4, 4.15, 3.9) == pytest.approx(50)
    assert cross_entropy_gap_closed(3.8, 3.7, 3.9) is None


def test_intervals_hold_the_truth_and_narrow_with_documents(rng: np.random.Generator) -> None:
    widths: dict[int, list[float]] = {20: [], 160: []}
    held = 0
    for documents, list_of_widths in widths.items():
        for _ in range(100):
            before = _measurement(1.0, 4.0, 0.0, rng, documents)
            teacher = _shifted(before, 0.0, -1.0, 0.1, rng)
            after = _shifted(before, -0.4, -0.5, 0.1, rng)
            kl, entropy = Bootstrap(documents, resamples=300).gaps(before, after, teacher)
            assert kl is not None
            assert entropy is not None
            held += (kl.low < 40 < kl.high) + (entropy.low < 50 < entropy.high)
            list_of_widths.append(kl.high - kl.low)
    assert 0.88 < held / 400 < 0.98
    assert np.mean(widths[160]) < np.mean(widths[20]) / 2


def test_not_a_number_becomes_nothing_in_json() -> None:
    one = np.array([3.0])
    fields = as_json(Measurement(one, one, one, one).figures)
    assert fields["kl_error"] is None
    assert fields["kl"] == 1.0


@pytest.mark.parametrize(
    ("kl", "entropy", "effect"),
    [(-0.2, -0.2, "helps"), (-0.2, 0.2, "mixed"), (0.2, 0.2, "harms"), (0.0, 0.2, "harms"), (0.0, 0.0, "none")],
)
def test_effects(kl: float, entropy: float, effect: str, rng: np.random.Generator) -> None:
    before = _measurement(1.0, 4.0, 0.3, rng)
    after = _shifted(before, kl, entropy, 0.02 if kl or entropy else 0.0, rng)
    assert effect_of(before, after) == effect


def test_what_one_temperature_does_as_well_is_recalibration(rng: np.random.Generator) -> None:
    before = _measurement(1.0, 4.0, 0.3, rng)
    after = _shifted(before, -0.2, -0.2, 0.02, rng)
    assert effect_of(before, after, ahead_of_temperature=Interval(0.01, 0.02)) == "helps"
    assert effect_of(before, after, ahead_of_temperature=Interval(-0.01, 0.02)) == "recalibrates"
    assert effect_of(before, after, kl_interval=Interval(-0.1, 30.0)) == "unproven"
    worse = _shifted(before, -0.2, 0.2, 0.02, rng)
    assert effect_of(before, worse, ahead_of_temperature=Interval(-0.01, 0.02)) == "mixed"


def test_little_text_is_not_called_no_effect(rng: np.random.Generator) -> None:
    little, much = (_measurement(1.0, 4.0, 0.3, rng, documents) for documents in (6, 600))
    assert effect_of(little, _shifted(little, -0.02, -0.02, 0.05, rng)) == "unproven"
    assert effect_of(much, _shifted(much, 0.0, 0.0, 0.05, rng)) == "none"
    figures, gap = little.figures, GapClosed(1.0, 1.0)
    words = Evaluation(
        effect="unproven", teacher=figures, student=figures, adapted=figures, gap_closed=gap, controls=(),
        temperature_control=None, vocabulary=320, sequence_length=64, seconds=1.0, places={},
    ).verdict  # fmt: skip
    assert words.startswith("Not proven on so little text")
    assert "harm" not in words.lower()


def test_intervals_of_the_figures_hold_the_truth(rng: np.random.Generator) -> None:
    held = 0
    for _ in range(100):
        figures = Bootstrap(40, resamples=300).figures(_measurement(1.0, 4.0, 0.2, rng))
        assert figures.kl_interval is not None
        assert figures.cross_entropy_interval is not None
        held += figures.kl_interval.low < 1.0 < figures.kl_interval.high
        held += figures.cross_entropy_interval.low < 4.0 < figures.cross_entropy_interval.high
    assert 0.86 < held / 200 < 0.99


def test_a_single_document_has_no_interval() -> None:
    one = np.array([3.0])
    measurement = Measurement(one, one, one, one)
    assert Bootstrap(1).figures(measurement).kl_interval is None
    assert Bootstrap(1).kl_fall(measurement, measurement) is None
