"""An adapter with a LoRA pair on the head and nothing in the body, through every verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_svd_distill.adapter.merge import merge
from moe_svd_distill.adapter.naming import lora_keys
from moe_svd_distill.adapter.random_control import write_random_control
from moe_svd_distill.adapter.repair import rebuild_configuration
from moe_svd_distill.adapter.verify import check_loads, verify
from tests.adapter.conftest import Case
from tests.support import tiny

HEAD = "lm_head.weight"
RANKS = [1, 8, 32]  # the last is the width of the model: any change of the head has a pair of that rank


def head_pair(case: Case, rank: int) -> dict[str, torch.Tensor]:
    return tiny.random_pairs(case.student, [HEAD], rank=lambda name: rank, dtype=torch.float32)


@pytest.mark.parametrize("rank", RANKS)
def test_the_configuration_targets_the_head_alone(case: Case, rank: int) -> None:
    found = tiny.configure(case.student, head_pair(case, rank))
    assert (found["target_modules"], found["target_parameters"]) == (["lm_head"], [])
    assert (found["r"], found["lora_alpha"], found["rank_pattern"], found["alpha_pattern"]) == (rank, rank, {}, {})
    assert "modules_to_save" not in found


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_peft_and_our_merge_give_the_sum(case: Case, tmp_path: Path, rank: int, scale: float) -> None:
    pairs = head_pair(case, rank)
    configuration = tiny.configure(case.student, pairs) | {"lora_alpha": scale * rank}
    adapter = tiny.save_adapter(tmp_path / "adapter", case.student, pairs, configuration)
    report = check_loads(adapter, case.student)
    assert (report.keys, report.targets, dict(report.scales)) == (2, 1, {"lm_head": scale})
    assert verify(adapter, case.student).pairs == 1
    model = tiny.with_adapter(case.student, adapter)
    live = tiny.logits(model)
    assert (live - tiny.logits(tiny.load_model(case.student))).abs().max() > 1e-2
    model.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == pairs.keys()
    assert torch.equal(tiny.logits(tiny.with_adapter(case.student, tmp_path / "again")), live)
    before = {name: weight.clone() for name, weight in tiny.load_model(case.student).named_parameters()}
    merged = model.merge_and_unload()
    for name, weight in merged.named_parameters():
        wanted = tiny.truth(case.student, pairs, scale)[HEAD] if name == HEAD else before[name]
        torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-6, msg=name)
    torch.testing.assert_close(tiny.logits(merged), live, rtol=0, atol=1e-4)
    merge(adapter, case.student, tmp_path / "merged")
    ours, own = tiny.hub_weights(tmp_path / "merged"), tiny.hub_weights(case.student)
    assert torch.equal(ours[HEAD], tiny.truth(case.student, pairs, scale)[HEAD].to(torch.bfloat16))
    assert {name for name in own if not torch.equal(ours[name], own[name])} == {HEAD}


def test_the_configuration_is_rebuilt_from_the_head_alone(case: Case, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tmp_path / "adapter", case.student, head_pair(case, 8))
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert rebuild_configuration(adapter, case.student) == written
    guessed = rebuild_configuration(adapter)
    assert guessed | {"base_model_name_or_path": written["base_model_name_or_path"]} == written


def test_the_random_control_of_a_head(case: Case, tmp_path: Path) -> None:
    pairs = head_pair(case, 8)
    adapter = tiny.save_adapter(tmp_path / "adapter", case.student, pairs)
    key_a, key_b = lora_keys("lm_head")
    write_random_control(adapter, tmp_path / "control", 0)
    control = load_file(tmp_path / "control" / "adapter_model.safetensors")
    norm = (pairs[key_b] @ pairs[key_a]).norm()
    torch.testing.assert_close((control[key_b] @ control[key_a]).norm(), norm, rtol=1e-4, atol=0)
    assert check_loads(tmp_path / "control", case.student).targets == 1
