"""Keeping the largest entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_svd_distill.algebra.sparsity import keep_largest


@settings(deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), fraction=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_exactly_the_largest_entries_are_kept(rows: int, columns: int, fraction: float, seed: int) -> None:
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    sparse = keep_largest(delta, fraction, rescale=False)
    kept = max(1, round(fraction * delta.numel()))
    assert int((sparse != 0).sum()) == kept
    threshold = delta.abs().flatten().sort(descending=True).values[kept - 1]
    assert torch.equal(sparse, torch.where(delta.abs() >= threshold, delta, 0.0))


def test_the_norm_is_restored() -> None:
    delta = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    sparse = keep_largest(delta, 0.2, rescale=True)
    torch.testing.assert_close(sparse.norm(), delta.norm())
    plain = keep_largest(delta, 0.2, rescale=False)
    torch.testing.assert_close(sparse / sparse.norm(), plain / plain.norm())


def test_ties_are_broken_by_place() -> None:
    assert keep_largest(torch.ones(6), 0.5, rescale=False).tolist() == [1, 1, 1, 0, 0, 0]


def test_zeros_stay_zeros() -> None:
    assert not keep_largest(torch.zeros(4, 4), 0.25, rescale=True).any()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_impossible_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        keep_largest(torch.ones(3), fraction, rescale=False)
