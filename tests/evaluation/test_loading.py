"""An adapter around a student in memory, and back to the untouched student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.loading import AdaptedStudent
from moe_svd_distill.streaming import group_of
from tests.support.language import qwen3_moe

IDS = torch.arange(1, 65).reshape(2, 32)
_SETTINGS: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": ["q_proj", "lm_head"]},
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]},
    "all": {
        "target_modules": ["o_proj", "lm_head"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        "rank_pattern": {r".*\.experts\.gate_up_proj": 8},
        "alpha_pattern": {r".*\.experts\.gate_up_proj": 24},
    },
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
}
_TIED_SETTINGS: dict[str, dict[str, Any]] = {
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole head beside a pair of the embeddings": {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
    },
}


def _adapter(folder: Path, kind: str, *, tied: bool = False) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(11)
    settings = {"target_modules": [], **(_TIED_SETTINGS if tied else _SETTINGS)[kind]}
    base = qwen3_moe(320, tie_word_embeddings=tied)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "modules_to_save" in name:
                tensor.add_(0.1 * torch.randn(tensor.shape))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("kind", list(_SETTINGS))
def test_an_adapter_acts_as_peft_loads_it_and_comes_off_again(tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    folder = _adapter(tmp_path, kind)
    untouched = _logits(qwen3_moe(320))
    plain = _logits(PeftModel.from_pretrained(qwen3_moe(320), folder).eval())
    assert (plain - untouched).abs().max() > 1e-2
    adapted = AdaptedStudent.load(qwen3_moe(320), folder)
    assert torch.equal(_logits(adapted.model), plain)
    assert not any(tensor.requires_grad for tensor in adapted.model.parameters())
    assert torch.equal(_logits(adapted.detach()), untouched)


@pytest.mark.parametrize("kind", list(_TIED_SETTINGS))
def test_the_other_side_of_a_tied_matrix_is_left_alone(tmp_path: Path, kind: str) -> None:
    folder = _adapter(tmp_path, kind, tied=True)
    student = qwen3_moe(320, tie_word_embeddings=True)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    untouched, embeddings = _logits(student), student.get_input_embeddings().weight.detach().clone()
    adapted = AdaptedStudent.load(student, folder)
    assert (_logits(adapted.model) - untouched).abs().max() > 1e-2
    table = student.get_input_embeddings()
    torch.testing.assert_close(getattr(table, "base_layer", table).weight, embeddings, rtol=0, atol=0)
    assert torch.equal(_logits(adapted.detach()), untouched)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_one_student_takes_one_adapter_after_the_other(tmp_path: Path) -> None:
    student = qwen3_moe(320)
    first = _adapter(tmp_path / "first", "experts")
    second = _adapter(tmp_path / "second", "layers")
    AdaptedStudent.load(student, first).detach()
    adapted = AdaptedStudent.load(student, second)
    assert torch.equal(_logits(adapted.model), _logits(AdaptedStudent.load(qwen3_moe(320), second).model))


def test_an_adapter_for_another_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataError):
        AdaptedStudent.load(qwen3_moe(320, hidden_size=64), _adapter(tmp_path, "layers"))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("lm_head.weight", "head"),
        ("model.embed_tokens.weight", "embeddings"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp"),
        ("model.layers.0.mlp.shared_experts.gate_proj.weight", "mlp"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "mlp"),
        ("model.layers.0.mlp.gate.weight", "experts"),
        ("model.layers.0.mlp.experts.12.down_proj.weight", "experts"),
        ("model.layers.0.mlp.experts.base_layer.gate_up_proj", "experts"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", "experts"),
        ("model.layers.0.feed_forward.router.weight", "experts"),
    ],
)
def test_groups_by_name(name: str, group: str) -> None:
    assert group_of(name) == group
