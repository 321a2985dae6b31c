"""A head saved whole, through every verb of the room and through PEFT itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.merge import merge
from moe_svd_distill.adapter.naming import lora_keys, whole_key
from moe_svd_distill.adapter.random_control import write_random_control
from moe_svd_distill.adapter.repair import rebuild_configuration, repair_keys, unmatched_keys
from moe_svd_distill.adapter.verify import check_loads, verify
from moe_svd_distill.adapter.whole_head import change_of_head, rounding_norm
from moe_svd_distill.errors import BadDataError, NothingToTransferError
from tests.adapter.conftest import Case
from tests.support import tiny

KEY = "base_model.model.lm_head.weight"
Write = Callable[..., Path]


def adapter_of(case: Case, folder: Path, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = tiny.with_whole_head(case.student, case.pairs, **changes)
    return tiny.save_adapter(folder / "adapter", case.student, tensors), tensors


def silent(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same adapter with every pair at zero: only the head acts."""
    return {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}


def test_the_key_is_the_one_peft_saves(dense: Case, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(tiny.load_model(dense.student), config).save_pretrained(str(tmp_path / "by_peft"))
    saved = load_file(tmp_path / "by_peft" / "adapter_model.safetensors")
    assert [key for key in saved if "lora" not in key] == [KEY] == [whole_key("lm_head")]
    assert torch.equal(saved[KEY], tiny.own_head(dense.student))
    report = check_loads(tmp_path / "by_peft", dense.student)
    assert (report.replaced, report.missing, report.unexpected) == (("lm_head",), (), ())


def test_peft_live_merged_and_saved_again_is_the_truth(case: Case, tmp_path: Path) -> None:
    adapter, tensors = adapter_of(case, tmp_path)
    report = check_loads(adapter, case.student)
    assert report.replaced == ("lm_head",)
    assert report.keys == len(tensors)
    model = tiny.with_adapter(case.student, adapter)
    live = tiny.logits(model)
    model.save_pretrained(str(tmp_path / "again"))
    torch.testing.assert_close(
        tiny.logits(tiny.with_adapter(case.student, tmp_path / "again")), live, rtol=0, atol=1e-5
    )
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.lm_head.weight, tensors[KEY], rtol=0, atol=1e-6)
    torch.testing.assert_close(tiny.logits(merged), live, rtol=0, atol=1e-4)
    for name, weight in tiny.truth(case.student, tensors).items():
        if "self_attn" in name and name.endswith("proj.weight"):
            torch.testing.assert_close(merged.get_parameter(name), weight, rtol=1e-6, atol=1e-6, msg=name)
    merged.save_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(tiny.logits(tiny.load_model(tmp_path / "merged")), live, rtol=0, atol=1e-4)
    only_head = tiny.save_adapter(tmp_path / "head", case.student, silent(tensors))
    assert (tiny.logits(tiny.with_adapter(case.student, only_head)) - live).abs().max() > 1e-2
    assert (
        tiny.logits(tiny.with_adapter(case.student, only_head)) - tiny.logits(tiny.load_model(case.student))
    ).abs().max() > 0.1


def test_our_merge_replaces_the_head(case: Case, tmp_path: Path) -> None:
    adapter, tensors = adapter_of(case, tmp_path)
    report = merge(adapter, case.student, tmp_path / "merged")
    before, after = tiny.hub_weights(case.student), tiny.hub_weights(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert (report.merged, report.untied) == (len(tensors) // 2 + 1, False)
    assert report.merged + report.copied == len(before)
    assert torch.equal(after["lm_head.weight"], tensors[KEY].to(torch.bfloat16))
    assert after["lm_head.weight"].dtype is before["lm_head.weight"].dtype
    assert (tmp_path / "merged" / "config.json").read_bytes() == (case.student / "config.json").read_bytes()
    for name, weight in tiny.truth(case.student, tensors).items():
        assert bool(((after[name].float() - weight).abs() <= 2.0**-8 * weight.abs() + 1e-6).all()), name


def test_a_pair_of_full_rank_says_the_same(case: Case, tmp_path: Path) -> None:
    adapter, tensors = adapter_of(case, tmp_path)
    base = tiny.own_head(case.student)
    key_a, key_b = lora_keys("lm_head")
    exact = {key_a: torch.eye(base.shape[1]), key_b: tensors[KEY] - base}
    body = {key: value for key, value in tensors.items() if key != KEY}
    full = tiny.save_adapter(tmp_path / "full", case.student, body | exact)
    configuration = json.loads((full / "adapter_config.json").read_text())
    assert configuration["rank_pattern"]["lm_head"] == configuration["alpha_pattern"]["lm_head"] == base.shape[1]
    found = tiny.logits(tiny.with_adapter(case.student, full))
    torch.testing.assert_close(found, tiny.logits(tiny.with_adapter(case.student, adapter)), rtol=0, atol=1e-4)


def test_peft_fills_the_base_weight_without_a_word_where_the_entry_is_missing(dense: Case, tmp_path: Path) -> None:
    """Why the load check looks at modules_to_save itself: PEFT reports nothing missing and nothing unexpected."""
    adapter, tensors = adapter_of(dense, tmp_path)
    configuration = json.loads((adapter / "adapter_config.json").read_text())
    assert configuration.pop("modules_to_save") == ["lm_head"]
    (adapter / "adapter_config.json").write_text(json.dumps(configuration))
    model = tiny.with_adapter(dense.student, adapter)
    assert torch.equal(model.get_base_model().lm_head.weight, tensors[KEY])  # not even disabling the adapter helps
    for check in (check_loads, merge):
        arguments = [tmp_path / "out"] if check is merge else []
        with pytest.raises(BadDataError, match=r"modules_to_save is None, expected \['lm_head'\]"):
            check(adapter, dense.student, *arguments)  # type: ignore[operator]


@pytest.mark.parametrize("named", [["lm_head", "embed_tokens"], ["norm"], "lm_head", []])
def test_another_list_of_modules_is_refused(dense: Case, tmp_path: Path, named: Any) -> None:
    adapter, _ = adapter_of(dense, tmp_path)
    configuration = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(configuration | {"modules_to_save": named}))
    for call in (
        lambda: check_loads(adapter, dense.student),
        lambda: verify(adapter),
        lambda: merge(adapter, dense.student, tmp_path / "out"),
    ):
        with pytest.raises(BadDataError, match="modules_to_save"):
            call()


def test_an_entry_without_its_tensor_is_refused(case: Case, write: Write) -> None:
    configuration = json.loads((case.adapter / "adapter_config.json").read_text())
    changed = write(case, case.pairs, configuration | {"modules_to_save": ["lm_head"]})
    with pytest.raises(BadDataError, match=r"modules_to_save is \['lm_head'\], expected None"):
        check_loads(changed, case.student)


def test_another_vocabulary_is_refused(dense: Case, tmp_path: Path) -> None:
    adapter, tensors = adapter_of(dense, tmp_path)
    wide = tensors | {KEY: torch.ones(65, 32)}
    tiny.save_adapter(adapter, dense.student, wide)
    with pytest.raises(BadDataError, match="size mismatch"):
        check_loads(adapter, dense.student)
    for call in (
        lambda: merge(adapter, dense.student, tmp_path / "out"),
        lambda: write_random_control(adapter, tmp_path / "random", 0, dense.student),
    ):
        with pytest.raises(BadDataError, match="64×32 in the student, the adapter's is 65×32"):
            call()


def test_a_whole_head_needs_a_pair_beside_it_and_none_of_its_own(dense: Case, tmp_path: Path) -> None:
    tensors = tiny.with_whole_head(dense.student, dense.pairs)
    with pytest.raises(BadDataError, match="PEFT loads no adapter without a LoRA pair"):
        tiny.configure(dense.student, {KEY: tensors[KEY]})
    with pytest.raises(ValueError, match="No modules were targeted"):  # what PEFT itself says of it
        get_peft_model(tiny.load_model(dense.student), LoraConfig(target_modules=[], modules_to_save=["lm_head"]))
    for faulty, message in [
        (dense.pairs | {KEY: tensors[KEY]}, "saved whole and has a LoRA pair as well"),
        (tensors | {KEY: torch.ones(64)}, "expected vocabulary×hidden"),
        ({KEY: tensors[KEY]}, "PEFT loads no adapter without a LoRA pair"),
    ]:
        adapter = tiny.save_adapter(tmp_path / "adapter", dense.student, faulty, tiny.configure(dense.student, tensors))
        for call in (verify, merge, rebuild_configuration):
            with pytest.raises(BadDataError, match=message):
                call(adapter, dense.student, *[tmp_path / "out"] * (call is merge))  # type: ignore[operator]


def test_the_random_control_has_the_norm_and_another_direction(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    adapter, tensors = adapter_of(case, tmp_path)
    base = tiny.own_head(case.student)
    found = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        write_random_control(adapter, tmp_path / name, seed, case.student)
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")[KEY] - base
    assert torch.equal(found["one"], found["again"])
    assert not torch.equal(found["one"], found["two"])
    change = tensors[KEY] - base
    torch.testing.assert_close(found["one"].norm(), change.norm(), rtol=1e-5, atol=0)
    for other in (change, found["two"]):
        assert abs(float((found["one"] * other).sum() / (found["one"].norm() * other.norm()))) < 0.15
    assert check_loads(tmp_path / "one", case.student).replaced == ("lm_head",)
    assert verify(tmp_path / "one", case.student).whole == ("lm_head",)
    monkeypatch.setattr(sys.modules["moe_svd_distill.adapter.whole_head"], "BLOCK_ELEMENTS", 7 * 32)
    write_random_control(adapter, tmp_path / "blocks", 1)  # the student that the configuration names
    blocks = load_file(tmp_path / "blocks" / "adapter_model.safetensors")[KEY] - base
    torch.testing.assert_close(blocks.norm(), change.norm(), rtol=1e-5, atol=0)


def test_verify_knows_whether_the_head_changes_anything(dense: Case, tmp_path: Path) -> None:
    adapter, tensors = adapter_of(dense, tmp_path)
    report = verify(adapter, dense.student)
    assert (report.whole, report.warnings[1:]) == (("lm_head",), ())
    assert "lm_head saved whole" in report.summary
    zero = silent(tensors)
    quiet = verify(tiny.save_adapter(tmp_path / "quiet", dense.student, zero), dense.student)
    assert quiet.transferred
    assert len(quiet.zero_pairs) == quiet.pairs
    nothing = tiny.save_adapter(tmp_path / "nothing", dense.student, zero | {KEY: tiny.own_head(dense.student)})
    with pytest.raises(NothingToTransferError):
        verify(nothing, dense.student)
    (nothing / "run.json").write_text('{"transferred": false}')
    assert not verify(nothing, dense.student).transferred
    (tmp_path / "quiet" / "run.json").write_text('{"transferred": false}')
    with pytest.raises(BadDataError, match="a head saved whole differs"):
        verify(tmp_path / "quiet", dense.student)


def test_verify_says_that_it_could_not_compare(dense: Case, tmp_path: Path) -> None:
    _, tensors = adapter_of(dense, tmp_path)
    configuration = tiny.configure(dense.student, tensors) | {"base_model_name_or_path": "organisation/student"}
    away = tiny.save_adapter(tmp_path / "away", dense.student, silent(tensors), configuration)
    report = verify(away)
    assert report.transferred
    assert any("lm_head is saved whole; whether it differs" in warning for warning in report.warnings)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((dense.student / "config.json").read_text())
    assert any("was not checked" in warning for warning in verify(away, tmp_path / "config").warnings)


@pytest.mark.parametrize(("size", "warned"), [(0.1, False), (2e-4, True)])
def test_a_change_that_bf16_swallows_is_named(dense: Case, tmp_path: Path, size: float, warned: bool) -> None:
    adapter, _ = adapter_of(dense, tmp_path, size=size, dtype=torch.bfloat16)
    assert any("rounding alone" in warning for warning in verify(adapter, dense.student).warnings) is warned
    exact, _ = adapter_of(dense, tmp_path / "exact", size=size)
    assert not any("rounding alone" in warning for warning in verify(exact, dense.student).warnings)
    architecture = tiny.architecture_of(dense.student)
    change = change_of_head(LowRankPairs(adapter, architecture), architecture)
    assert change is not None
    wanted = size * (64 * 32) ** 0.5 / float(tiny.own_head(dense.student).norm())
    assert change[0] == pytest.approx(wanted, rel=0.1 if not warned else 1.0)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(-12, 8), seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_the_expected_rounding_is_what_rounding_does(scale: float, seed: int, dtype: torch.dtype) -> None:
    exact = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = exact * 2.0 ** (scale if dtype is torch.bfloat16 else scale / 8)
    rounded = exact.to(dtype)
    wanted = float((rounded.double() - exact).norm())
    assert rounding_norm(rounded, 8 if dtype is torch.bfloat16 else 11) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("fault", ["nan", "zero"])
def test_values_of_the_head_are_looked_at(dense: Case, tmp_path: Path, fault: str) -> None:
    _, tensors = adapter_of(dense, tmp_path)
    head = torch.full((64, 32), float("nan")) if fault == "nan" else torch.zeros(64, 32)
    broken = tiny.save_adapter(tmp_path / "broken", dense.student, tensors | {KEY: head})
    with pytest.raises(BadDataError, match="NaN or Inf" if fault == "nan" else "a head of zeros says nothing"):
        verify(broken, dense.student)
    if fault == "nan":
        with pytest.raises(BadDataError, match="not finite"):
            merge(broken, dense.student, tmp_path / "out")


@pytest.mark.parametrize(
    "wrong",
    [
        "lm_head.weight",
        "base_model.model.base_model.model.lm_head.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "lm_head.modules_to_save.default.weight",
    ],
)
def test_misspelt_names_are_told_and_repaired(dense: Case, tmp_path: Path, wrong: str) -> None:
    _, tensors = adapter_of(dense, tmp_path)
    misspelt = {wrong if key == KEY else key: value for key, value in tensors.items()}
    configuration = tiny.configure(dense.student, tensors)
    folder = tiny.save_adapter(tmp_path / "wrong", dense.student, misspelt, configuration)
    if "modules_to_save" in wrong or not wrong.startswith("base_model"):
        assert wrong in unmatched_keys(misspelt)
    with pytest.raises(BadDataError):
        check_loads(folder, dense.student)
    assert repair_keys(folder, tmp_path / "right.safetensors") == {wrong: KEY}
    (tmp_path / "right.safetensors").replace(folder / "adapter_model.safetensors")
    assert check_loads(folder, dense.student).replaced == ("lm_head",)


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.norm", "model.layers.0.self_attn.q_proj"])
def test_nothing_else_can_be_saved_whole(dense: Case, tmp_path: Path, module: str) -> None:
    weight = tiny.hub_weights(dense.student)[f"{module}.weight"]
    pairs = {key: value for key, value in dense.pairs.items() if module not in key} | {whole_key(module): weight}
    configuration = tiny.configure(dense.student, dense.pairs) | {"modules_to_save": [module]}
    adapter = tiny.save_adapter(tmp_path / "adapter", dense.student, pairs, configuration)
    with pytest.raises(BadDataError):
        merge(adapter, dense.student, tmp_path / "out")
    with pytest.raises(BadDataError):
        rebuild_configuration(adapter, dense.student)


def test_the_configuration_is_rebuilt(case: Case, tmp_path: Path) -> None:
    adapter, _ = adapter_of(case, tmp_path)
    written = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").unlink()
    assert rebuild_configuration(adapter, case.student) == written
    assert rebuild_configuration(adapter)["modules_to_save"] == written["modules_to_save"] == ["lm_head"]


def test_in_a_bf16_model_a_head_in_fp32_is_rounded_on_load(dense: Case, tmp_path: Path) -> None:
    """Why the student's dtype is the one to store: PEFT keeps a replaced module in the model's own."""
    adapter, tensors = adapter_of(dense, tmp_path)
    head = (
        tiny.with_adapter(dense.student, adapter, torch.bfloat16)
        .get_base_model()
        .lm_head.modules_to_save["default"]
        .weight
    )
    assert head.dtype is torch.bfloat16
    assert torch.equal(head, tensors[KEY].to(torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(
            tiny.load_model(dense.student, torch.bfloat16), str(adapter), low_cpu_mem_usage=True
        )
    with pytest.raises(RuntimeError, match="dtype"):
        tiny.logits(model)
