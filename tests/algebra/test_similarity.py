"""Similarity with its control: what a shared origin shows, what chance shows, and what only looks alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_svd_distill.algebra.similarity import flattened, match_best_rows, match_channels, row_similarity


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(64, 200), st.integers(32, 96), st.integers(0, 10**6))
def test_unrelated_matrices_are_at_chance(rows: int, columns: int, seed: int) -> None:
    left, right = normal(rows, columns, seed), normal(rows, columns, seed + 1)
    in_place = row_similarity(left, right)
    assert abs(in_place.cosine - in_place.chance) < in_place.spread
    for _, found in (match_best_rows(left, right), match_channels(flattened(left), flattened(right))):
        assert abs(found.cosine - found.chance) < found.spread


@settings(max_examples=25, deadline=None)
@given(st.floats(0.0, 1.5), st.integers(0, 10**6))
def test_noise_lowers_the_cosine_as_theory_says(noise: float, seed: int) -> None:
    left = normal(400, 64, seed)
    found = row_similarity(left, left + noise * normal(400, 64, seed + 1))
    assert found.cosine == pytest.approx((1 + noise**2) ** -0.5, abs=0.03)
    assert abs(found.chance) < 0.02


def test_a_common_direction_is_not_kinship() -> None:
    direction = 3 * normal(1, 48, 9)
    left, right = normal(300, 48, 1) + direction, normal(300, 48, 2) + direction
    assert float(torch.nn.functional.cosine_similarity(left, right).mean()) > 0.5
    assert abs(row_similarity(left, right).cosine) < 0.05


@settings(max_examples=20, deadline=None)
@given(st.integers(40, 80), st.integers(20, 40), st.integers(0, 10**6))
def test_moved_rows_and_channels_are_found_again(many: int, few: int, seed: int) -> None:
    chosen = torch.randperm(many, generator=torch.Generator().manual_seed(seed))[:few]
    rows = normal(many, 60, seed)
    index, found = match_best_rows(rows, rows[chosen] + 0.1 * normal(few, 60, seed + 1))
    assert torch.equal(index, chosen)
    assert found.cosine > 0.95 > found.chance
    table = normal(300, many, seed)
    index, found = match_channels(flattened(table), flattened(table[:, chosen] + 0.1 * normal(300, few, seed + 1)))
    assert torch.equal(index, chosen)
    assert found.cosine - found.chance > 0.5


def test_flattening_takes_away_what_one_text_gives_both_models() -> None:
    """Two tables that share a strong property of tokens (such as frequency) and nothing else."""
    property_of_tokens = normal(500, 1, 0)
    left, right = (normal(500, 64, seed) + 4 * property_of_tokens @ normal(1, 64, seed + 10) for seed in (1, 2))
    raw, flat = match_channels(left, right)[1], match_channels(flattened(left), flattened(right))[1]
    assert raw.cosine - raw.chance > 0.4
    assert flat.cosine - flat.chance < 0.25 * (raw.cosine - raw.chance)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_flattening_equals_its_definition(shape: tuple[int, int]) -> None:
    matrix = normal(*shape, 3)
    rows = torch.nn.functional.normalize(matrix, dim=1)
    left, values, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    level = values.square().sum() / min(shape)
    expected = left @ torch.diag(values / (values.square() + level).sqrt()) @ right
    assert torch.allclose(flattened(matrix), expected, atol=1e-4)


def test_one_row_has_no_control() -> None:
    with pytest.raises(ValueError, match="1 rows cannot be compared"):
        row_similarity(normal(1, 3, 0), normal(1, 3, 0))
