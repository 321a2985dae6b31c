"""Planted permutations are found and undone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_svd_distill.algebra.matching import (
    block_index,
    cosine_similarity,
    expert_probe_features,
    match_attention_heads,
    match_neurons,
    match_similarity,
    permute_heads,
    permute_neurons,
)

SEEDS = st.integers(0, 10_000)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def noisy(tensor: Tensor, seed: int, amount: float = 0.3) -> Tensor:
    return tensor + amount * tensor.std() * torch.randn(tensor.shape, generator=seeded(seed + 77))


def mlp(neurons: int, hidden: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(neurons, hidden, seed=seed),
        random(neurons, hidden, seed=seed + 1),
        random(hidden, neurons, seed=seed + 2),
    )


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, neurons=st.integers(2, 80))
def test_planted_neurons_are_found_and_undone(seed: int, neurons: int) -> None:
    teacher = mlp(neurons, 32, seed)
    index = torch.randperm(neurons, generator=seeded(seed))
    student = tuple(noisy(tensor, seed) for tensor in permute_neurons(*teacher, index))
    found = match_neurons(*teacher, *student)
    assert torch.equal(found.teacher_index, index)
    restored = permute_neurons(*permute_neurons(*teacher, index), found.teacher_index.argsort())
    for original, tensor in zip(teacher, restored, strict=True):
        assert torch.equal(original, tensor)


def test_no_part_of_a_neuron_drowns_the_others() -> None:
    gate, up, down = mlp(30, 40, 0)
    index = torch.randperm(30, generator=seeded(3))
    student = permute_neurons(random(30, 40, seed=9) * 1e-3, up, down, index)
    assert torch.equal(match_neurons(gate * 1e3, up, down, *student).teacher_index, index)


def test_probe_features_do_not_see_the_order_of_neurons() -> None:
    gate, up, down = (tensor[None] for tensor in mlp(16, 12, 0))
    order = torch.randperm(16, generator=seeded(1))
    probes = random(12, 3, seed=2)
    plain = expert_probe_features(gate, up, down, probes)
    permuted = expert_probe_features(gate[:, order], up[:, order], down[:, :, order], probes)
    assert plain.shape == (1, 36)
    torch.testing.assert_close(permuted, plain, rtol=1e-4, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, kv_heads=st.integers(1, 6), group=st.integers(1, 4), fewer=st.booleans())
def test_planted_heads_are_found_and_undone(seed: int, kv_heads: int, group: int, fewer: bool) -> None:
    size, hidden = 4, 32
    q, o = random(kv_heads * group * size, hidden, seed=seed), random(hidden, kv_heads * group * size, seed=seed + 1)
    k, v = random(kv_heads * size, hidden, seed=seed + 2), random(kv_heads * size, hidden, seed=seed + 3)
    kept_kv = max(1, kv_heads - 1) if fewer else kv_heads
    kept_group = max(1, group - 1) if fewer else group
    kv_index = torch.randperm(kv_heads, generator=seeded(seed))[:kept_kv]
    query_index = torch.cat(
        [kv * group + torch.randperm(group, generator=seeded(seed + kv))[:kept_group] for kv in kv_index.tolist()]
    )
    permuted = permute_heads((q, k, v, o), kv_index, query_index, size)
    student = tuple(noisy(tensor, seed + i) for i, tensor in enumerate(permuted))
    kv, query = match_attention_heads((q, k, v, o), student, size)
    assert torch.equal(kv.teacher_index, kv_index)
    assert torch.equal(query.teacher_index, query_index)
    assert min(kv.similarity, query.similarity) > 0.85
    if not fewer:
        back = permute_heads(permuted, kv.teacher_index.argsort(), query.teacher_index.argsort(), size)
        for original, tensor in zip((q, k, v, o), back, strict=True):
            assert torch.equal(original, tensor)


def test_heads_in_their_own_order_are_the_identity() -> None:
    tensors = random(16, 8), random(8, 8, seed=1), random(8, 8, seed=2), random(8, 16, seed=3)
    assert all(found.is_identity for found in match_attention_heads(tensors, tensors, 4))
    swapped = permute_heads(tensors, torch.tensor([1, 0]), torch.tensor([2, 3, 0, 1]), 4)
    assert not any(found.is_identity for found in match_attention_heads(tensors, swapped, 4))


def test_heads_that_do_not_fit_are_refused() -> None:
    wide = random(16, 8), random(4, 8), random(4, 8), random(8, 16)
    narrow = random(8, 8), random(4, 8), random(4, 8), random(8, 8)
    with pytest.raises(ValueError, match="do not fit"):
        match_attention_heads(narrow, wide, 4)
    with pytest.raises(ValueError, match="groups of heads"):
        match_attention_heads(wide, wide, 3)


def test_the_matching_is_one_to_one_where_the_row_maxima_collide() -> None:
    similarity = torch.tensor([[0.9, 0.8], [0.7, 0.1]])
    assert match_similarity(similarity).teacher_index.tolist() == [1, 0]
    assert match_similarity(torch.tensor([[0.5]])).similarity == 0.5


def test_impossible_matchings_are_refused() -> None:
    with pytest.raises(ValueError, match="one to one"):
        match_similarity(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="finite"):
        match_similarity(torch.full((3, 3), float("nan")))


def test_a_row_of_zeros_matches_anything_with_similarity_zero() -> None:
    rows = random(3, 4)
    student = rows.clone()
    student[1] = 0
    assert match_similarity(cosine_similarity([rows], [student])).teacher_index.tolist() == [0, 1, 2]


def test_block_index() -> None:
    assert block_index(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]
