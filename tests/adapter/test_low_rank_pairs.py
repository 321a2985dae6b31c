from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs, norm_of_pair
from moe_svd_distill.adapter.naming import lora_keys, pair_shapes, whole_modules
from moe_svd_distill.adapter.random_control import write_random_control
from moe_svd_distill.adapter.verify import verify
from moe_svd_distill.errors import BadDataError, CannotWriteError, MissingInputError
from tests.adapter.conftest import Case
from tests.support import tiny

FILE = "adapter_model.safetensors"


def read(case: Case, adapter: Path | None = None, *, configured: bool = True) -> LowRankPairs:
    return LowRankPairs(adapter or case.adapter, tiny.architecture_of(case.student), configured=configured)


def product(pairs: LowRankPairs, name: str) -> torch.Tensor:
    return pairs[name].left.double() @ pairs[name].right.double() * pairs[name].scale


def norm(pairs: LowRankPairs, name: str) -> float:
    return norm_of_pair(pairs[name].left, pairs[name].right)


@pytest.mark.parametrize("configured", [True, False])
def test_pairs_are_read_one_by_one(case: Case, configured: bool) -> None:
    pairs = read(case, configured=configured)
    assert list(pairs) == tiny.carried(case.student)
    exact = tiny.truth(case.student, case.pairs)
    for name, weight in tiny.hub_weights(case.student).items():
        inside = [f"{name}[{number}]" for number in range(tiny.EXPERTS)] if f"{name}[0]" in pairs else [name]
        for number, matrix in enumerate(inside if inside[0] in pairs else ()):
            delta = (exact[name] - weight.float()).double()
            change = delta[number].T if matrix != name else delta
            torch.testing.assert_close(product(pairs, matrix), change, rtol=1e-3, atol=1e-6)
            assert norm(pairs, matrix) == pytest.approx(float(change.norm()), rel=1e-3)
            assert pairs.rank(matrix) == tiny.default_rank(matrix) == pairs[matrix].right.shape[0]
    with pytest.raises(KeyError):
        pairs["nothing"]


def test_embeddings_are_turned(dense: Case, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    tensors = tiny.random_pairs(dense.student, [name])
    assert sorted(tuple(value.shape) for value in tensors.values()) == [(4, 64), (32, 4)]
    pair = read(dense, tiny.save_adapter(tmp_path / "a", dense.student, tensors))[name]
    assert (pair.left.shape, pair.right.shape) == ((64, 4), (4, 32))


def test_the_configuration_s_ranks_must_be_the_file_s(sparse: Case, tmp_path: Path) -> None:
    for change, message in [({"r": 5}, "rank 5, expected 4"), ({"rank_pattern": {}}, "rank 4, expected 8")]:
        configuration = tiny.configure(sparse.student, sparse.pairs) | change
        adapter = tiny.save_adapter(tmp_path / "a", sparse.student, sparse.pairs, configuration)
        with pytest.raises(BadDataError, match=message):
            [read(sparse, adapter).scale(name) for name in tiny.carried(sparse.student)]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("model.layers.3.self_attn.q_proj", r"has no model\.layers\.3\.self_attn\.q_proj to change"),
        ("model.layers.0.input_layernorm", "to change"),
        ("model.layers.0.self_attn.k_proj", "is 16×32 in the student, the adapter's is 32×32"),
    ],
)
def test_a_pair_without_a_place_is_refused(dense: Case, tmp_path: Path, module: str, message: str) -> None:
    key_a, key_b = lora_keys(module)
    pairs = dense.pairs | {key_a: torch.ones(4, 32), key_b: torch.ones(32, 4)}
    configuration = tiny.configure(dense.student, dense.pairs)
    adapter = tiny.save_adapter(tmp_path / "a", dense.student, pairs, configuration)
    with pytest.raises(BadDataError, match=message):
        read(dense, adapter)


def test_half_a_pair_and_odd_shapes_are_refused() -> None:
    key_a, key_b = lora_keys("model.q_proj")
    other = dict.fromkeys(lora_keys("model.k_proj"), (4, 4))
    for shapes, message in [
        ({key_a: (4, 32)}, "the B of model.q_proj is missing"),
        ({key_b: (32, 4)}, "the A of model.q_proj is missing"),
        ({key_a: (4, 32), key_b: (32, 5)}, "A is 4×32 and B is 32×5"),
        ({key_a: (4,), key_b: (32, 4)}, "A is 4 and B is 32×4"),
        ({key_a: (0, 32), key_b: (32, 0)}, "expected rank×in and out×rank"),
        ({}, "no LoRA tensors"),
    ]:
        with pytest.raises(BadDataError, match=message):
            pair_shapes(shapes if not shapes else other | shapes)
    with pytest.raises(BadDataError, match="expected vocabulary×hidden"):
        whole_modules({"base_model.model.lm_head.weight": (64,)})


def test_a_file_cut_off_later_is_an_error_and_no_crash(dense: Case, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tmp_path / "a", dense.student, dense.pairs)
    pairs = read(dense, adapter)
    with (adapter / FILE).open("r+b") as stream:
        stream.truncate(pairs.header.file_bytes // 2)
    with pytest.raises(BadDataError, match="was cut off"):
        [norm(pairs, name) for name in pairs]
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(BadDataError):
        read(dense, adapter)
    with pytest.raises(MissingInputError):
        read(dense, tmp_path)


def test_random_control_has_the_norms_and_nothing_else(case: Case, tmp_path: Path) -> None:
    write_random_control(case.adapter, tmp_path / "one", seed=1)
    original, control = read(case), read(case, tmp_path / "one")
    assert original.header.digest == control.header.digest
    for key_a, key_b, module in ((s.key_a, s.key_b, s.module) for s in pair_shapes(shapes(original)).values()):
        experts = original.read_pair(module)[2]
        before, after = (
            dense_change(*(tensors[key].double() for key in (key_a, key_b)), experts)
            for tensors in (case.pairs, tiny.hub_weights(tmp_path / "one"))
        )
        assert float(after.norm()) == pytest.approx(float(before.norm()), rel=5e-3)
        assert abs(float(torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0))) < 0.5
    report = verify(tmp_path / "one", case.student)
    assert report.digest_checked
    assert report.transferred
    write_random_control(case.adapter, tmp_path / "again", seed=1)
    write_random_control(case.adapter, tmp_path / "other", seed=2)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "again" / FILE).read_bytes()
    assert (tmp_path / "one" / FILE).read_bytes() != (tmp_path / "other" / FILE).read_bytes()
    with pytest.raises(CannotWriteError):
        write_random_control(case.adapter, tmp_path / "one", seed=3)


def shapes(pairs: LowRankPairs) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in pairs.header.tensors.items()}


def dense_change(a: torch.Tensor, b: torch.Tensor, experts: int) -> torch.Tensor:
    """What a pair of all experts changes, expert after expert."""
    rank = len(a) // experts
    return torch.einsum("ore,eri->eoi", b.view(len(b), rank, experts), a.view(experts, rank, -1))


def test_random_control_of_zero_is_zero_and_fp32_is_exact(dense: Case, tmp_path: Path) -> None:
    pairs = {key: value.float() for key, value in dense.pairs.items()}
    zero = next(key for key in pairs if "lora_B" in key)
    pairs[zero] = torch.zeros_like(pairs[zero])
    adapter = tiny.save_adapter(tmp_path / "a", dense.student, pairs)
    write_random_control(adapter, tmp_path / "control", seed=0)
    original, control = read(dense, adapter), read(dense, tmp_path / "control")
    for name in original:
        assert norm(control, name) == pytest.approx(norm(original, name), rel=1e-5)
    assert sum(norm(control, name) == 0 for name in control) == 1
