"""Copies of a text with tokens drawn from the student's own predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_svd_distill.algebra.logits import LogitTransform
from moe_svd_distill.pipeline.extra_text import (
    MOST_COPIES,
    _one_each,
    default_copies,
    default_generated,
    perturbed_copies,
    random_sequences,
    resample_tokens,
)
from moe_svd_distill.streaming import Head

COMMON, ALL = 40, 100
COUNT, LENGTH, WIDTH = 24, 128, 6


class States:
    """Final states in memory, read as those on the disk are."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states

    def rows(self, rows: slice) -> torch.Tensor:
        return self.states[rows]


@pytest.fixture(scope="module")
def text() -> Any:
    """Ids that the head does not have, so that every replacement shows."""
    sequences = np.random.default_rng(0).integers(COMMON, ALL, (COUNT, LENGTH))
    generator = torch.Generator().manual_seed(0)
    states = States(torch.randn(COUNT, LENGTH, WIDTH, generator=generator))
    head = Head(torch.randn(COMMON, WIDTH, generator=generator), None, LogitTransform())
    return sequences, states, head


@pytest.mark.parametrize(("copies", "shares"), [(1, [0.3]), (3, [0.3] * 3), (5, [0.3, 0.6, 0.3, 0.6, 0.3])])
def test_the_share_of_changed_tokens_is_as_said(text: Any, copies: int, shares: list[float]) -> None:
    sequences, states, head = text
    before = sequences.copy()
    result = perturbed_copies(sequences, states, head, copies, seed=3)
    assert result.shape == (copies * COUNT, LENGTH)
    assert result.dtype == np.int64
    assert (sequences == before).all()
    for copy, share in zip(result.reshape(copies, COUNT, LENGTH), shares, strict=True):
        changed = copy != sequences
        assert not changed[:, 0].any()
        assert (copy[changed] < COMMON).all()
        assert changed[:, 1:].mean() == pytest.approx(share, abs=4 * 0.5 / np.sqrt(COUNT * LENGTH))
        assert changed[:, -1].any()


def test_the_seed_decides(text: Any) -> None:
    sequences, states, head = text
    first, again, other = (perturbed_copies(sequences, states, head, 2, seed=seed) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()
    assert (first[:COUNT] != first[COUNT:]).any()


def test_a_token_is_drawn_from_what_is_expected_after_the_one_before_it(text: Any) -> None:
    sequences, states, _ = text
    sure = Head(200 * torch.randn(COMMON, WIDTH, generator=torch.Generator().manual_seed(1)), None, LogitTransform())
    expected = sure.logits(states.states[:, :-1]).argmax(-1).numpy()
    result = perturbed_copies(sequences, states, sure, 1, seed=0)
    changed = result[:, 1:] != sequences[:, 1:]
    assert (result[:, 1:][changed] == expected[changed]).mean() > 0.95
    flat = Head(torch.zeros(COMMON, WIDTH), None, LogitTransform())
    drawn = perturbed_copies(sequences, states, flat, 1, seed=0)
    assert len(np.unique(drawn[drawn < COMMON])) == COMMON


def test_long_sequences_are_drawn_chunk_by_chunk_without_a_seam(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, states, head = text
    monkeypatch.setattr("moe_svd_distill.pipeline.extra_text._LOGIT_BYTES", 4 * COMMON * 50)  # 50 places of 127
    result = perturbed_copies(sequences, states, head, 1, seed=3)
    changed = result != sequences
    assert not changed[:, 0].any()
    for place in (49, 50, 51, 100, 101, LENGTH - 1):
        assert changed[:, place].any()
    assert changed[:, 1:].mean() == pytest.approx(0.3, abs=0.04)


def test_no_copies_are_an_empty_text(text: Any) -> None:
    sequences, states, head = text
    assert perturbed_copies(sequences, states, head, 0, seed=0).shape == (0, LENGTH)


@pytest.mark.parametrize(("tokens", "copies"), [(512, MOST_COPIES), (32_768, 7), (65_536, 3), (1 << 24, 2)])
def test_many_copies_of_little_text_and_few_of_much(tokens: int, copies: int) -> None:
    assert default_copies(tokens) == copies


def test_own_text_is_drawn_from_what_the_student_expects(text: Any) -> None:
    sequences, states, head = text
    drawn = resample_tokens(sequences, states, head, seed=3)
    assert np.array_equal(drawn[:, 0], sequences[:, 0])
    assert int(drawn[:, 1:].max()) < COMMON
    expected = torch.softmax(head.logits(states.states[:, :-1].flatten(0, 1)), dim=-1)
    frequency = np.bincount(drawn[:, 1:].ravel(), minlength=COMMON) / drawn[:, 1:].size
    assert np.abs(frequency - expected.mean(0).numpy()).max() < 0.02
    likelihood = expected[torch.arange(len(expected)), torch.from_numpy(drawn[:, 1:].ravel())].mean()
    assert float(likelihood) == pytest.approx(float((expected**2).sum(-1).mean()), rel=0.1)
    assert np.array_equal(drawn, resample_tokens(sequences, states, head, seed=3))
    assert not np.array_equal(drawn, resample_tokens(sequences, states, head, seed=4))


def test_own_text_begins_with_any_token() -> None:
    found = random_sequences(50, 20, 30, seed=1)
    assert found.shape == (50, 20)
    assert set(np.unique(found)) == set(range(30))
    assert [default_generated(copies) for copies in (0, 1, 2, 3, 7)] == [0, 0, 1, 1, 3]


def test_one_token_each_is_drawn_as_often_as_expected() -> None:
    expected = torch.tensor([[0.0, 0.5, 0.2, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]]).repeat(20_000, 1)
    drawn = _one_each(expected, torch.Generator().manual_seed(0)).view(-1, 2)
    shares = torch.bincount(drawn[:, 0], minlength=5) / len(drawn)
    torch.testing.assert_close(shares, expected[0], rtol=0, atol=0.015)
    assert shares[0] == shares[4] == 0
    assert not drawn[:, 1].any()
