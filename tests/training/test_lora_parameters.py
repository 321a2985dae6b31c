"""The bank of factors: what moves as pairs and what as a whole, what a start becomes, and what is handed out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_svd_distill.errors import UsageError
from moe_svd_distill.training.lora_pairs import FULL_DELTA_RATE, Block, Pair
from moe_svd_distill.training.optimiser import AdamW, _shares
from tests.support.models import saved
from tests.support.training import disturb, pairs_of, setting

RANK = 12  # between the sides of the tiny model's matrices: some changes are whole at it, some are not


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen3_moe", tmp_path_factory.mktemp("model") / "student", dtype=torch.float32)


def test_where_the_rank_is_full_the_change_moves_as_a_whole(model: Path, tmp_path: Path) -> None:
    bank = setting(model, tmp_path, rank=RANK).bank
    pairs = dict(pairs_of(bank))
    shapes = {name: (len(b), a.shape[1]) for name, (b, a) in pairs.items()}
    whole = sum(rows * columns for rows, columns in shapes.values() if min(rows, columns) <= RANK)
    factors = sum(RANK * (rows + columns) for rows, columns in shapes.values() if min(rows, columns) > RANK)
    assert whole
    assert factors
    assert len(bank.values) == whole + factors
    rates = [block.rate for block in bank.blocks]
    assert rates == sorted(rates)
    assert bank.blocks[-1].end == len(bank.values)
    assert sum(block.end - block.begin for block in bank.blocks if block.rate == FULL_DELTA_RATE) == whole
    for b, a in pairs.values():
        assert not (b @ a).any()


@pytest.mark.parametrize("rank", [4, RANK, 100])
def test_a_start_of_lower_rank_is_kept_exactly(model: Path, tmp_path: Path, rank: int) -> None:
    first = setting(model, tmp_path, rank=3)
    disturb(first.bank)
    start: dict[str, Pair] = {name: (b.clone(), a.clone()) for name, (b, a) in pairs_of(first.bank)}
    for name, (b, a) in pairs_of(setting(model, tmp_path, rank=rank, start=start).bank):
        torch.testing.assert_close(b @ a, start[name][0] @ start[name][1])


def test_a_start_of_higher_rank_is_refused(model: Path, tmp_path: Path) -> None:
    start = {name: pair for name, pair in pairs_of(setting(model, tmp_path, rank=5).bank) if "q_proj" in name}
    with pytest.raises(UsageError, match=r"the start has rank 5 for .*q_proj.*, the adapter is to have 3"):
        setting(model, tmp_path, rank=3, start=start)


def test_products_are_scaled_for_a_while(model: Path, tmp_path: Path) -> None:
    bank = setting(model, tmp_path, rank=RANK).bank
    disturb(bank)
    before = {name: b @ a for name, (b, a) in pairs_of(bank)}
    with bank.scaled(0.25):
        for name, (b, a) in pairs_of(bank):
            torch.testing.assert_close(b @ a, 0.25 * before[name])
    for name, (b, a) in pairs_of(bank):
        assert torch.equal(b @ a, before[name])
    bank.reset_to_zero()
    assert not any((b @ a).any() for _, (b, a) in pairs_of(bank))


def test_adamw_moves_each_block_at_its_rate() -> None:
    blocks = [Block(0, 2, 1, 3, 0.5), Block(6, 1, 2, 2, 1.0), Block(10, 1, 2, 1, 1.0)]
    values, gradient = torch.zeros(12), torch.full((12,), 0.7)
    optimiser = AdamW(values, gradient, (0.9, 0.98), 0.0, blocks)
    optimiser.step(0.1)
    torch.testing.assert_close(values, torch.tensor([-0.05] * 6 + [-0.1] * 6))
    saved_state = {name: tensor.clone() for name, tensor in optimiser.tensors().items()}
    again = values.clone()
    second = AdamW(again, gradient, (0.9, 0.98), 0.0, blocks)
    second.restore(saved_state)
    for each in (optimiser, second):
        each.step(0.1)
    assert torch.equal(values, again)


def test_steps_are_dealt_out_evenly() -> None:
    blocks = [Block(0, 4, 8, 8, 0.5), Block(256, 1, 8, 8, 1.0), Block(320, 1, 8, 8, 1.0), Block(384, 2, 8, 8, 1.0)]
    shares = _shares(blocks, 2)
    assert sorted((block for share in shares for block in share), key=lambda block: block.begin) == blocks
    sizes = [sum(block.end - block.begin for block in share) for share in shares]
    assert sizes == [256, 256]
