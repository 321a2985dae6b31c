"""The must-show of the room: for every matrix of every student, the weights PEFT merges are ``W + scale · B A``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import save_file

from moe_svd_distill.adapter.merge import merge
from moe_svd_distill.adapter.verify import check_loads
from tests.adapter.conftest import Case
from tests.support import tiny

BF16_ROUNDING = 2.0**-8  # of eight significant bits, to nearest


def weights_in_memory(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()}


def assert_peft_merges(case: Case, pairs: dict[str, torch.Tensor], adapter: Path, scale: float = 1.0) -> Any:
    """PEFT's merge against ``W + scale · B A`` under stored names, loaded by transformers; returns what PEFT merged."""
    folder = adapter.parent / "truth"
    folder.mkdir()
    (folder / "config.json").write_text((case.student / "config.json").read_text())
    save_file(tiny.truth(case.student, pairs, scale), folder / "model.safetensors", metadata={"format": "pt"})
    expected = weights_in_memory(tiny.load_model(folder))
    loaded = tiny.with_adapter(case.student, adapter)
    unmerged = tiny.logits(loaded)
    merged = loaded.merge_and_unload()
    found = weights_in_memory(merged)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6 * scale, atol=1e-6 * scale, msg=name)
    torch.testing.assert_close(tiny.logits(merged), unmerged, rtol=0, atol=1e-4 * scale)
    return merged


def test_peft_merges_every_matrix_right(case: Case, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tmp_path / "adapter", case.student, case.pairs)
    merged = assert_peft_merges(case, case.pairs, adapter)
    found, student = weights_in_memory(merged), weights_in_memory(tiny.load_model(case.student))
    unchanged = {name for name in found if found[name].ndim > 1 and torch.equal(found[name], student[name])}
    assert {name for name in unchanged if "_bias" not in name} <= {"model.embed_tokens.weight"}
    assert (tiny.logits(merged) - tiny.logits(tiny.load_model(case.student))).abs().max() > 1e-2


def test_peft_in_bf16_and_our_merge_agree_to_bf16_rounding(case: Case, tmp_path: Path) -> None:
    exact = tiny.truth(case.student, case.pairs)
    size = {name: weight.float().abs() for name, weight in tiny.hub_weights(case.student).items()}
    merged = tiny.with_adapter(case.student, case.adapter, torch.bfloat16).merge_and_unload()
    merged.save_pretrained(tmp_path / "peft")
    merge(case.adapter, case.student, tmp_path / "ours")
    by_peft, by_us = tiny.hub_weights(tmp_path / "peft"), tiny.hub_weights(tmp_path / "ours")
    assert by_peft.keys() == by_us.keys() == exact.keys()
    equal = total = 0
    for name, weight in exact.items():
        # PEFT rounds the delta and the sum; we round the sum alone, to the nearest bf16 value.
        delta = (weight - tiny.hub_weights(case.student)[name].float()).abs()
        bound = BF16_ROUNDING * (weight.abs() + delta + size[name]) + 1e-9
        assert bool(((by_peft[name].float() - weight).abs() <= bound).all()), name
        assert bool(((by_us[name].float() - weight).abs() <= BF16_ROUNDING * weight.abs() + 1e-6).all()), name
        assert by_us[name].dtype is torch.bfloat16
        equal += int((by_us[name] == weight.to(torch.bfloat16)).sum())
        total += weight.numel()
    assert equal / total > 0.999


def test_our_merge_reloaded_by_transformers_speaks_like_the_adapter(case: Case, tmp_path: Path) -> None:
    merge(case.adapter, case.student, tmp_path / "merged")
    merged = tiny.logits(tiny.load_model(tmp_path / "merged"))
    unmerged = tiny.logits(tiny.with_adapter(case.student, case.adapter, torch.float32))
    student = tiny.logits(tiny.load_model(case.student))
    # Means, because rounding may send a token on the edge to another expert.
    assert (merged - unmerged).abs().mean() < 0.05 * (student - unmerged).abs().mean()


def test_other_scales_are_applied_as_peft_applies_them(case: Case, tmp_path: Path) -> None:
    """alpha is three times the rank everywhere, as a foreign adapter may have it."""
    configuration = tiny.configure(case.student, case.pairs)
    configuration["lora_alpha"] *= 3
    configuration["alpha_pattern"] = {key: 3 * alpha for key, alpha in configuration["alpha_pattern"].items()}
    adapter = tiny.save_adapter(tmp_path / "adapter", case.student, case.pairs, configuration)
    assert set(check_loads(adapter, case.student).scales.values()) == {3.0}
    assert_peft_merges(case, case.pairs, adapter, 3.0)
    merge(adapter, case.student, tmp_path / "merged")
    for name, weight in tiny.truth(case.student, case.pairs, 3.0).items():
        merged = tiny.hub_weights(tmp_path / "merged")[name].float()
        assert bool(((merged - weight).abs() <= BF16_ROUNDING * weight.abs() + 1e-6).all()), name


def test_ranks_that_differ_by_layer_and_role(case: Case, tmp_path: Path) -> None:
    def rank(hub_name: str) -> int:
        if "layers.1." in hub_name:
            return 2
        return 6 if any(part in hub_name for part in (".w2", "down_proj.weight", "o_proj")) else 3

    pairs = tiny.random_pairs(case.student, rank=rank)
    adapter = tiny.save_adapter(tmp_path / "adapter", case.student, pairs)
    assert_peft_merges(case, pairs, adapter)


def test_gate_and_up_of_unequal_rank(make_case: Callable[[str], Case], tmp_path: Path) -> None:
    case = make_case("glm4_moe")
    pairs = tiny.random_pairs(case.student, rank=lambda name: 5 if ".experts." in name and "up_proj" in name else 4)
    adapter = tiny.save_adapter(tmp_path / "adapter", case.student, pairs)
    assert_peft_merges(case, pairs, adapter)


def test_embeddings_of_an_untied_student(case: Case, tmp_path: Path) -> None:
    pairs = tiny.random_pairs(case.student, tiny.carried(case.student, embedding=True))
    adapter = tiny.save_adapter(tmp_path / "adapter", case.student, pairs)
    assert_peft_merges(case, pairs, adapter)
    merge(adapter, case.student, tmp_path / "merged")
    exact = tiny.truth(case.student, pairs)["model.embed_tokens.weight"]
    ours = tiny.hub_weights(tmp_path / "merged")["model.embed_tokens.weight"].float()
    assert bool(((ours - exact).abs() <= BF16_ROUNDING * exact.abs() + 1e-6).all())
    assert not torch.equal(ours, tiny.hub_weights(case.student)["model.embed_tokens.weight"].float())


def test_each_pair_alone_changes_what_the_student_says(case: Case, tmp_path: Path) -> None:
    """No class of modules is a silent no-op: one pair of each kind is set, all others are zero."""
    zeros = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in case.pairs.items()}
    loaded = tiny.with_adapter(case.student, tiny.save_adapter(tmp_path / "zero", case.student, zeros), torch.float32)
    silent = tiny.logits(loaded)
    torch.testing.assert_close(silent, tiny.logits(tiny.load_model(case.student)), rtol=0, atol=1e-5)
    one_of_each = {re.sub(r"\.\d+\.", ".", key): key for key in reversed(case.pairs) if "lora_B" in key}
    for key in one_of_each.values():
        result = set_peft_model_state_dict(loaded, zeros | {key: case.pairs[key] * 3})
        assert not result.unexpected_keys
        assert (tiny.logits(loaded) - silent).abs().max() > 1e-4, key


@pytest.mark.parametrize("rows", [1, 7])
def test_blocks_of_rows_do_not_change_the_result(
    dense: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    import sys

    merge(dense.adapter, dense.student, tmp_path / "whole")
    monkeypatch.setattr(sys.modules["moe_svd_distill.adapter.whole_head"], "BLOCK_ELEMENTS", rows * 32)
    merge(dense.adapter, dense.student, tmp_path / "blocks")
    whole, blocks = tiny.hub_weights(tmp_path / "whole"), tiny.hub_weights(tmp_path / "blocks")
    for name, weight in whole.items():
        torch.testing.assert_close(blocks[name], weight, rtol=2 * BF16_ROUNDING, atol=1e-6, msg=name)
        assert float((blocks[name] != weight).float().mean()) < 0.01
