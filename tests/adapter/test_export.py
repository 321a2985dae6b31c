"""The same changes under other keys: each layout loads in PEFT where it can, and means what the original means."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_svd_distill.adapter.adapter_file import adapter_header
from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.export import export
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError, IncompatiblePairError
from moe_svd_distill.files.names import ADAPTER_FILE
from tests.support import architectures, tiny

TEXT_CLASSES = ["gemma3", "gemma4", "kimi_k25", "llama4", "mistral3", "qwen3_5_moe"]


def _adapter(model_type: str, folder: Path, part: str = "") -> tuple[Path, Path]:
    """A saved model, and an adapter with a random pair for every matrix that has the part in its name."""
    student = architectures.saved(model_type, folder / "student")
    keys = tiny.keys_of(student)
    names = [name for name in tiny.carried(student) if part in name]
    ranks = {target.parameter: target.rank(tiny.default_rank) for target in keys.changed_by(names)}
    configuration = build_configuration(keys, ranks, base_model=str(student))
    pairs = tiny.random_pairs(student, names, dtype=torch.float32)
    return student, tiny.save_adapter(folder / "adapter", student, pairs, configuration)


def _changes(folder: Path, student: Path, *, text_only: bool = False) -> dict[str, torch.Tensor]:
    pairs = LowRankPairs(folder, Architecture(open_checkpoint(student), text_only=text_only))
    return {name: pairs[name].scale * pairs[name].left @ pairs[name].right for name in pairs}


@pytest.mark.parametrize("layout", ["peft", "fused"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "gpt_oss", "llama4", "phimoe"])
def test_a_layout_of_peft_loads_and_changes_the_same(model_type: str, layout: Any, tmp_path: Path) -> None:
    student, adapter = _adapter(model_type, tmp_path)
    report = export(adapter, tmp_path / "out", layout, student)
    assert report.loads
    check_loads(tmp_path / "out", student)
    before, after = _changes(adapter, student), _changes(tmp_path / "out", student)
    assert before.keys() == after.keys()
    for name, change in before.items():
        torch.testing.assert_close(after[name], change, rtol=1e-4, atol=1e-5, msg=name)
    if layout == "fused":
        assert not any(".experts.0." in key for key in adapter_header(tmp_path / "out").tensors)


def test_a_fused_adapter_comes_back_as_it_was(tmp_path: Path) -> None:
    student, adapter = _adapter("qwen3_moe", tmp_path)
    export(adapter, tmp_path / "fused", "fused", student)
    export(tmp_path / "fused", tmp_path / "back", "peft", student)
    before, after = _changes(adapter, student), _changes(tmp_path / "back", student)
    for name, change in before.items():
        torch.testing.assert_close(after[name], change, rtol=1e-4, atol=1e-5, msg=name)


def test_plain_has_stored_names_and_last_names(tmp_path: Path) -> None:
    student, adapter = _adapter("glm4_moe", tmp_path)
    report = export(adapter, tmp_path / "out", "plain", student)
    configuration = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert configuration["target_parameters"] == []
    assert all("." not in entry for entry in configuration["target_modules"])
    stems = {
        key.removeprefix("base_model.model.").partition(".lora_")[0] for key in adapter_header(tmp_path / "out").tensors
    }
    assert {f"{stem}.weight" for stem in stems} <= set(open_checkpoint(student))
    assert not report.loads  # peft#3711: PEFT on transformers 5 takes the dense MLPs for experts
    assert report.why_not
    assert any("--max-lora-rank" in limit for limit in report.limits)
    dense_student, dense = _adapter("llama", tmp_path / "dense")
    assert export(dense, tmp_path / "plain", "plain", dense_student).loads


def test_plain_of_some_layers_names_these_alone(tmp_path: Path) -> None:
    student, adapter = _adapter("llama", tmp_path, ".1.self_attn.")
    report = export(adapter, tmp_path / "out", "plain", student)
    assert report.loads, report.why_not
    configuration = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert all(entry.startswith("1.self_attn.") for entry in configuration["target_modules"])


def test_plain_has_no_name_for_experts_in_one_tensor(tmp_path: Path) -> None:
    student, adapter = _adapter("gpt_oss", tmp_path)
    with pytest.raises(BadDataError, match=r"experts.*no name of its own.*fused"):
        export(adapter, tmp_path / "out", "plain", student)
    assert not (tmp_path / "out").exists()


def _without_one(key: str, value: torch.Tensor) -> torch.Tensor | None:
    return None if ".experts.1.up_proj" in key else value


def _of_other_rank(key: str, value: torch.Tensor) -> torch.Tensor | None:
    if ".experts.1.up_proj" not in key:
        return value
    return value[:2].contiguous() if "lora_A" in key else value[:, :2].contiguous()


def _without_all_gates(key: str, value: torch.Tensor) -> torch.Tensor | None:
    return None if "gate_proj" in key and ".experts." in key else value


@pytest.mark.parametrize("layout", ["peft", "plain", "fused", "gguf"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_one, r"experts\.1\.up_proj\.weight has no pair, expected one as .*experts\.0\."),
        (_of_other_rank, r"of a layer's experts have ranks .*2 \(.*experts\.1\.up_proj.*expected one"),
        (_without_all_gates, r"experts\.0\.gate_proj\.weight has no pair"),
    ],
)
def test_experts_with_and_without_a_pair_are_refused(layout: Any, change: Any, words: str, tmp_path: Path) -> None:
    student, adapter = _adapter("qwen3_moe", tmp_path)
    pairs = {key: change(key, value) for key, value in load_file(adapter / ADAPTER_FILE).items()}
    save_file({key: value for key, value in pairs.items() if value is not None}, adapter / ADAPTER_FILE)
    with pytest.raises(BadDataError, match=words):
        export(adapter, tmp_path / "out", layout, student)
    assert not (tmp_path / "out").exists()


def test_an_option_that_pairs_do_not_have_is_refused(tmp_path: Path) -> None:
    student, adapter = _adapter("llama", tmp_path)
    configuration = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(configuration | {"fan_in_fan_out": True}))
    with pytest.raises(BadDataError, match="fan_in_fan_out is True"):
        export(adapter, tmp_path / "out", "peft", student)


def test_limits_of_servers_are_named(tmp_path: Path) -> None:
    student, _ = _adapter("qwen3_moe", tmp_path)
    pairs = tiny.random_pairs(student, rank=lambda name: 24 if "lm_head" in name else 6)
    adapter = tiny.save_adapter(tmp_path / "ranks", student, pairs)
    limits = " ".join(export(adapter, tmp_path / "out", "peft", student).limits)
    assert "--max-lora-rank 32" in limits
    assert "wants one rank" in limits
    assert "router" in limits


@pytest.mark.parametrize("model_type", TEXT_CLASSES)
def test_an_adapter_of_a_wrapper_and_of_its_text_class(model_type: str, tmp_path: Path) -> None:
    from peft import PeftModel

    student, adapter = _adapter(model_type, tmp_path)
    with pytest.raises(BadDataError):
        check_loads(adapter, student, text_only=True)
    report = export(adapter, tmp_path / "text", "peft", student, text_only=True)
    assert report.loads
    with pytest.raises(BadDataError):
        check_loads(tmp_path / "text", student)
    inner = Architecture(open_checkpoint(student), text_only=True).skeleton
    whole = architectures.load(student)
    text = type(inner.model)(inner.model.config)
    names = {inner.name_of(name): tensor for name, tensor in whole.state_dict().items()}
    text.load_state_dict({name: names[name] for name in text.state_dict()})
    ids = architectures.tokens()
    plain = text.eval()(input_ids=ids, use_cache=False).logits
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(whole, str(adapter)).eval()(input_ids=ids, use_cache=False).logits
        mine = PeftModel.from_pretrained(text, str(tmp_path / "text")).eval()(input_ids=ids, use_cache=False).logits
    assert float((mine - plain).abs().max()) > 1e-3
    torch.testing.assert_close(mine, adapted, rtol=1e-3, atol=1e-3)


def test_a_model_without_a_text_class_says_so(tmp_path: Path) -> None:
    student, adapter = _adapter("qwen3_vl", tmp_path)
    with pytest.raises(IncompatiblePairError, match="no text-only language model"):
        export(adapter, tmp_path / "out", "peft", student, text_only=True)


def test_a_scale_goes_into_the_factors(tmp_path: Path) -> None:
    student, adapter = _adapter("llama", tmp_path)
    configuration = json.loads((adapter / "adapter_config.json").read_text())
    configuration |= {"lora_alpha": 2 * configuration["r"], "alpha_pattern": {}, "rank_pattern": {}}
    pairs = tiny.random_pairs(student, rank=lambda name: configuration["r"], dtype=torch.float32)
    save_file(pairs, adapter / ADAPTER_FILE, metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(configuration))
    export(adapter, tmp_path / "out", "peft", student)
    before, after = _changes(adapter, student), _changes(tmp_path / "out", student)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == configuration["r"]
    for name, change in before.items():
        torch.testing.assert_close(after[name], change)
