from pathlib import Path

import pytest

from moe_svd_distill.pipeline.ranks import trained_numbers
from tests.support.models import saved
from tests.training.setting import setting


@pytest.mark.parametrize("rank", [4, 12, 20, 31, 32, 100])
def test_as_many_numbers_as_move(tmp_path: Path, rank: int) -> None:
    bank = setting(saved("qwen3_moe", tmp_path / "student"), tmp_path, rank=rank).bank
    shapes = {name: (len(b), a.shape[1]) for name, (b, a) in bank.pairs()}
    assert trained_numbers(shapes, dict.fromkeys(shapes, rank)) == len(bank.values)
