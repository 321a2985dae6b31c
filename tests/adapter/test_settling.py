from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.adapter import settling
from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.keys import AdapterKeys, planned_tensors
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.peft_model import modules_of
from moe_svd_distill.adapter.settling import settle_keys
from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import open_checkpoint
from tests.adapter.conftest import Case
from tests.support import tiny

LOST = "PEFT loses its pair, under the stored name and under its own"


def settle_with(monkeypatch: pytest.MonkeyPatch, student: Path, spoil: Any) -> AdapterKeys:
    """The keys where PEFT gets other tensors than it was asked about: ``spoil`` returns one, or None to lose it."""
    real = settling.load

    def load(wrapped: Any, tensors: dict[str, torch.Tensor]) -> Any:
        given = {key: spoil(key, tensor) for key, tensor in tensors.items()}
        return real(wrapped, {key: tensor for key, tensor in given.items() if tensor is not None})

    monkeypatch.setattr(settling, "load", load)
    return settle_keys(Architecture(open_checkpoint(student)))


def test_the_stored_names_come_first_and_a_tensor_of_experts_has_one_pair(case: Case) -> None:
    for target in tiny.keys_of(case.student).targets.values():
        assert target.own_keys is not (case.name == "gpt_oss" and ".experts." in target.parameter)
        linear = ".self_attn." in target.parameter or target.names[0] in ("lm_head.weight", "model.embed_tokens.weight")
        assert linear <= (not target.as_parameter)


def test_linear_maps_that_peft_takes_for_experts_are_named_as_parameters(sparse: Case, dense: Case) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    assert tiny.keys_of(sparse.student).targets[name].as_parameter
    assert not tiny.keys_of(dense.student).targets[name].as_parameter


def test_nothing_is_read_and_nothing_stays_in_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("moe_svd_distill.checkpoints.tensors.tensor_view", forbidden)
    architecture = Architecture(open_checkpoint(case.student))
    assert settle_keys(architecture).targets.keys() == tiny.keys_of(case.student).targets.keys()
    for name, tensor in architecture.skeleton.model.state_dict().items():
        assert tensor.is_meta, name


def test_one_layer_speaks_for_all_of_its_make(sparse: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()

    def note(key: str, tensor: torch.Tensor) -> torch.Tensor:
        asked.add(key.removeprefix("base_model.model.").split(".")[2])
        return tensor

    keys = settle_with(monkeypatch, sparse.student, note)
    assert {number for number in asked if number.isdigit()} == {"0", "1"}  # the dense layer, and one with experts
    assert {target.parameter.split(".")[2] for target in keys.layers} == {"0", "1", "2"}


def test_where_stored_names_do_not_arrive_the_parameter_gets_one_pair(
    sparse: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = settle_with(
        monkeypatch, sparse.student, lambda key, tensor: None if re.search(r"experts\.\d", key) else tensor
    )
    fused = {target.parameter for target in keys.targets.values() if not target.own_keys}
    assert fused == {f"model.layers.{n}.mlp.experts.{side}" for n in (1, 2) for side in ("gate_up_proj", "down_proj")}
    assert LOST not in keys.left_out.values()


@pytest.mark.parametrize("spoilt", ["lost", "other values"])
def test_what_does_not_arrive_under_any_name_is_left_out_with_the_reason(
    dense: Case, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    def spoil(key: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if "o_proj" not in key:
            return tensor
        return None if spoilt == "lost" else 1.1 * tensor

    keys = settle_with(monkeypatch, dense.student, spoil)
    lost = {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(tiny.LAYERS)}
    assert {name for name, reason in keys.left_out.items() if reason == LOST} == lost
    assert not lost & set(keys.targets)
    assert len(keys.targets) == len(tiny.keys_of(dense.student).targets) - len(lost)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3"])
def test_every_parameter_can_be_written_with_one_pair(make_case: Any, tmp_path: Path, name: str) -> None:
    case = make_case(name)
    before = LowRankPairs(case.adapter, tiny.architecture_of(case.student))
    keys = tiny.keys_of(case.student).with_one_pair_a_parameter()
    targets = keys.changed_by(before)
    configuration = build_configuration(keys, before.parameter_ranks(), base_model=str(case.student))
    modules = modules_of(keys.architecture, configuration)
    tensors = {key: plan.make() for key, plan in planned_tensors(keys, targets, modules, before).items()}
    assert not [key for key in tensors if ".experts.0." in key]
    adapter = tiny.save_adapter(tmp_path / "fused", case.student, tensors, configuration)
    assert check_loads(adapter, case.student).scales == check_loads(case.adapter, case.student).scales
    after = LowRankPairs(adapter, keys.architecture)
    for matrix in before:
        wanted = before[matrix].left.float() @ before[matrix].right.float()
        torch.testing.assert_close(after[matrix].left.float() @ after[matrix].right.float(), wanted, msg=matrix)
