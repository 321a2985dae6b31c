"""Multiplier and cap are what the model's own logits say, and what they cannot explain is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_svd_distill.algebra.divergence import LogitTransform
from moe_svd_distill.architecture.building import find_decoder
from moe_svd_distill.architecture.head import MeasuredHead, check_is_linear, measure_head
from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming import load_head
from tests.architecture.conftest import Case
from tests.support import architectures


@torch.no_grad()
def states_and_logits(model: Any) -> tuple[Tensor, Tensor]:
    """What the decoder gives and what the model makes of it."""
    seen: list[Tensor] = []
    hook = find_decoder(model)[0].register_forward_hook(lambda _, __, output: seen.append(output[0]))
    logits = model(input_ids=architectures.tokens().to(model.device), use_cache=False).logits
    hook.remove()
    return seen[0], logits


def test_the_heads_logits_are_the_models(case: Case) -> None:
    states, expected = states_and_logits(case.resident)
    head = load_head(case.checkpoint)
    torch.testing.assert_close(head.logits(states), expected, rtol=1e-5, atol=1e-5)
    assert measure_head(case.resident) == measure_head(case.skeleton.model)


def test_half_precision_stays_close(case: Case) -> None:
    model = architectures.load(case.folder, torch.bfloat16)
    assert measure_head(model) == measure_head(case.skeleton.model)
    states, expected = states_and_logits(model)
    found = load_head(case.checkpoint, dtype=torch.bfloat16).logits(states)
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("model_type", "changes", "multiplier", "cap"),
    [
        ("llama", {}, 1.0, None),
        ("cohere2", {"logit_scale": 0.3}, 0.3, None),
        ("granite", {"logits_scaling": 13.0}, 1 / 13, None),
        ("granitemoe", {"logits_scaling": 6.0}, 1 / 6, None),
        ("minicpm3", {}, 8.0, None),
        ("gemma2", {"final_logit_softcapping": 2.5}, 1.0, 2.5),
        ("gemma3", {"final_logit_softcapping": 7.3}, 1.0, None),  # the wrapper has a cap in its configuration alone
        ("gemma4", {"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ("nanochat", {}, 1.0, 15.0),
        ("mistral_large4", {"final_logit_softcapping": 5.0}, 1.0, 5.0),
        ("beam", {"final_logit_softcapping": 11.0}, 1.0, 11.0),
        ("inkling_text", {}, 1 / 24, None),
        ("inkling2_text", {}, 1.0, 30.0),
    ],
)
def test_multipliers_and_caps_are_found(
    model_type: str, changes: dict[str, Any], multiplier: float, cap: float | None, tmp_path: Path
) -> None:
    case = Case(architectures.saved(model_type, tmp_path / "model", **changes))
    found = measure_head(case.empty_skeleton().model)
    assert found.transform.multiplier == pytest.approx(multiplier, rel=1e-6)
    assert found.transform.cap == (None if cap is None else pytest.approx(cap, rel=1e-6))
    states, expected = states_and_logits(case.resident)
    torch.testing.assert_close(load_head(case.checkpoint).logits(states), expected, rtol=1e-5, atol=1e-5)


def test_a_multiplier_and_a_cap_at_once(make_case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, make_case("llama"), lambda logits: 3.0 * torch.tanh(0.75 * logits / 3.0))
    assert measure_head(make_case("llama").resident).transform == LogitTransform(0.75, 3.0)


def test_rows_that_pad_the_head_give_no_logits(tmp_path: Path) -> None:
    case = Case(architectures.saved("inkling_text", tmp_path / "model", unpadded_vocab_size=90))
    assert measure_head(case.empty_skeleton().model).tokens == 90
    states, expected = states_and_logits(case.resident)
    assert expected.shape[-1] == 90
    torch.testing.assert_close(load_head(case.checkpoint).logits(states), expected, rtol=1e-5, atol=1e-5)


def test_a_biased_head(make_case: Callable[[str], Case]) -> None:
    head = load_head(make_case("phi").checkpoint)
    assert head.bias is not None
    assert bool(head.bias.all())


def test_the_model_is_as_before(make_case: Callable[[str], Case]) -> None:
    model = make_case("mistral3").skeleton.model
    before = [(name, id(module)) for name, module in model.named_modules()]
    measure_head(model)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_lora_around_the_head_changes_nothing(make_case: Callable[[str], Case]) -> None:
    from peft import LoraConfig, get_peft_model

    model = architectures.load(make_case("glm4_moe").folder)
    expected = measure_head(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"])).get_base_model()
    assert measure_head(adapted) == expected == MeasuredHead(LogitTransform(), architectures.VOCABULARY)


def after(monkeypatch: pytest.MonkeyPatch, case: Case, change: Callable[[Tensor], Tensor]) -> None:
    """Let the model's class do something to its logits."""
    kind = type(case.resident)
    forward = kind.forward

    def changed(self: Any, *arguments: Any, **keywords: Any) -> Any:
        output = forward(self, *arguments, **keywords)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(kind, "forward", changed)


def refusal(model: Any) -> str:
    with pytest.raises(IncompatiblePairError) as raised:
        measure_head(model)
    assert "\n" not in str(raised.value)
    assert raised.value.action == "Report the architecture to the project"
    return raised.value.what


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits - logits.mean(-1, keepdim=True),
        lambda logits: logits + 1.0,
        lambda logits: -logits,
        lambda logits: logits.clamp(-5.0, 5.0),
        lambda logits: logits.log_softmax(-1),
        lambda logits: logits.flip(-1),
        lambda logits: logits * torch.arange(1, 9).view(-1, 1),
        lambda logits: logits * 0.0,
        lambda logits: torch.cat((logits, logits[..., :1]), -1),
        lambda logits: 30 * torch.nn.functional.softsign(logits / 30),
    ],
)
def test_other_things_done_to_logits_are_refused(
    change: Callable[[Tensor], Tensor], make_case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("llama")
    after(monkeypatch, case, change)
    expected = "LlamaForCausalLM does something to its logits that is not known here"
    assert refusal(case.resident) == refusal(case.skeleton.model) == expected


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda states: states / states.norm(dim=-1, keepdim=True), "to its final states before the head"),
        (lambda states: states + 1, "to its final states before the head"),
        (lambda states: states[:, -1:], "does not give its final states to its head"),
        (lambda states: states.no_such_thing, "something unknown between its decoder and its logits"),
    ],
)
def test_other_things_done_to_states_are_refused(
    change: Callable[[Tensor], Tensor], what: str, make_case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(self: Any, input_ids: Tensor, **keywords: Any) -> Any:
        return SimpleNamespace(logits=self.lm_head(change(self.model(input_ids=input_ids).last_hidden_state)))

    case = make_case("llama")
    monkeypatch.setattr(type(case.resident), "forward", changed)
    assert what in refusal(case.resident)


def test_a_model_without_a_head_is_refused(make_case: Callable[[str], Case]) -> None:
    assert "has no output head with a weight" in refusal(make_case("llama").resident.model)


def test_a_head_that_is_called_twice_is_refused(
    make_case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(self: Any, input_ids: Tensor, **keywords: Any) -> Any:
        states = self.model(input_ids=input_ids).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(states) + self.lm_head(states))

    case = make_case("llama")
    monkeypatch.setattr(type(case.resident), "forward", changed)
    assert "does not give its final states to its head, all and once" in refusal(case.resident)


class _Scaled(nn.Linear):
    """A head that multiplies by something else than its weight."""

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states / states.norm(dim=-1, keepdim=True))


class _Named(nn.Linear):
    """A head of another name."""


def test_a_head_of_another_class_is_fine_if_it_is_linear() -> None:
    check_is_linear(_Named(16, 8))
    with pytest.raises(IncompatiblePairError, match="The head is _Scaled and does not multiply by its weight"):
        check_is_linear(_Scaled(16, 8))
