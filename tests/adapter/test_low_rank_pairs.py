from __future__ import annotations

from pathlib import Path

import pytest
import torch

# GONE ['scaled_copy']
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.random_control import write_random_control
from moe_svd_distill.adapter.verify import verify
from moe_svd_distill.checkpoints.header import read_header
from moe_svd_distill.errors import BadDataError, CannotWriteError, UsageError
from tests.adapter import tiny
from tests.adapter.conftest import Case

FILE = "adapter_model.safetensors"


def change(pairs: LowRankPairs, name: str) -> torch.Tensor:
    left, right = pairs[name].factors()
    return left.double() @ right.double()


def test_pairs_are_read_one_by_one(case: Case) -> None:
    pairs = LowRankPairs(case.adapter)
    assert list(pairs) == tiny.carried(case.student)
    exact = tiny.truth(case.student, case.pairs)
    for name, weight in tiny.hub_weights(case.student).items():
        if name in pairs:
            delta = (exact[name] - weight.float()).double()
            torch.testing.assert_close(change(pairs, name), delta, rtol=1e-3, atol=1e-6)
            assert pairs[name].norm() == pytest.approx(float(change(pairs, name).norm()), rel=1e-9)
            assert not pairs[name].is_zero()
    with pytest.raises(KeyError):
        pairs["nothing"]


def test_embeddings_are_turned(dense: Case, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    adapter = tiny.save_adapter(tmp_path / "a", dense.student, tiny.random_pairs(dense.student, [name]))
    pair = LowRankPairs(adapter)[name]
    left, right = pair.factors()
    assert (left.shape, right.shape) == ((64, 4), (4, 32))
    assert (pair.shape.rows, pair.shape.columns, pair.shape.rank) == (64, 32, 4)


def test_a_file_cut_off_later_is_an_error_and_no_crash(dense: Case, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tmp_path / "a", dense.student, dense.pairs)
    pairs = LowRankPairs(adapter)
    with (adapter / FILE).open("r+b") as stream:
        stream.truncate(pairs.header.file_bytes // 2)
    with pytest.raises(BadDataError, match="was cut off"):
        [pairs[name].norm() for name in pairs]


def test_random_control_has_the_norms_and_nothing_else(case: Case, tmp_path: Path) -> None:
    write_random_control(case.adapter, tmp_path / "one", seed=1)
    original, control = LowRankPairs(case.adapter), LowRankPairs(tmp_path / "one")
    assert original.header.digest == control.header.digest
    for name in original:
        assert control[name].norm() == pytest.approx(original[name].norm(), rel=5e-3)
        real, random = change(original, name).flatten(), change(control, name).flatten()
        assert abs(float(torch.nn.functional.cosine_similarity(real, random, dim=0))) < 0.5
    report = verify(tmp_path / "one", case.student)
    assert report.digest_checked
    assert report.transferred
    write_random_control(case.adapter, tmp_path / "again", seed=1)
    write_random_control(case.adapter, tmp_path / "other", seed=2)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "again" / FILE).read_bytes()
    assert (tmp_path / "one" / FILE).read_bytes() != (tmp_path / "other" / FILE).read_bytes()
    with pytest.raises(CannotWriteError):
        write_random_control(case.adapter, tmp_path / "one", seed=3)


def test_random_control_of_zero_is_zero_and_fp32_is_exact(dense: Case, tmp_path: Path) -> None:
    pairs = {key: value.float() for key, value in dense.pairs.items()}
    zero = next(key for key in pairs if "lora_B" in key)
    pairs[zero] = torch.zeros_like(pairs[zero])
    adapter = tiny.save_adapter(tmp_path / "a", dense.student, pairs)
    write_random_control(adapter, tmp_path / "control", seed=0)
    original, control = LowRankPairs(adapter), LowRankPairs(tmp_path / "control")
    for name in original:
        assert control[name].norm() == pytest.approx(original[name].norm(), rel=1e-5)
    assert sum(control[name].is_zero() for name in control) == 1


def test_scaling_touches_b_alone(case: Case, tmp_path: Path) -> None:
    def factor_of(name: str) -> float:
        return 0.0 if "q_proj" in name else 1.0 if "k_proj" in name else 0.37

    scaled_copy(case.adapter / FILE, tmp_path / FILE, factor_of)
    before, after = LowRankPairs(case.adapter), LowRankPairs(tmp_path / FILE)
    assert read_header(tmp_path / FILE).digest == before.header.digest
    for name in before:
        assert torch.equal(before[name].a, after[name].a)
        expected = (before[name].b.float() * factor_of(name)).bfloat16()
        assert torch.equal(after[name].b, expected)
        assert after[name].is_zero() == (factor_of(name) == 0.0)


def test_scaling_by_one_is_a_copy_and_may_replace_its_source(case: Case, tmp_path: Path) -> None:
    file = tmp_path / FILE
    scaled_copy(case.adapter, file, lambda _: 1.0)
    assert file.read_bytes() == (case.adapter / FILE).read_bytes()
    assert file.stat().st_mode & 0o777 == 0o644
    scaled_copy(file, file, lambda _: 2.0)
    pairs = LowRankPairs(file)
    for name in pairs:
        assert pairs[name].norm() == pytest.approx(2 * LowRankPairs(case.adapter)[name].norm())


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_factor_that_is_no_number_is_refused(dense: Case, tmp_path: Path, factor: float) -> None:
    with pytest.raises(UsageError, match="expected a finite number"):
        scaled_copy(dense.adapter, tmp_path / FILE, lambda _: factor)
    with pytest.raises(BadDataError, match="is not finite in BF16"):
        scaled_copy(dense.adapter, tmp_path / FILE, lambda _: 1e60)
    assert list(tmp_path.iterdir()) == []
