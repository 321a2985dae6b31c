"""Pairs that act beside their modules: the same states and gradients as inside the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moe_svd_distill.training import lora_parameters
from moe_svd_distill.training.lora_pairs import LoraPairs, LoraPairsBeside, add_product
from tests.support.models import saved
from tests.support.training import Setting, disturb, made_up_text, setting


def test_the_product_is_added_and_its_gradients_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    module = nn.Linear(6, 5).double().requires_grad_(False)
    states = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    (module(states) + states @ a.T @ b.T).mul(weights).sum().backward()
    expected = [tensor.grad for tensor in (states, a, b)]
    slopes = torch.ones_like(a), torch.ones_like(b)
    again = states.detach().requires_grad_(True)
    add_product(module, a.detach(), b.detach(), *slopes)
    module(again).mul(weights).sum().backward()
    for found, wanted in zip((again.grad, slopes[0] - 1, slopes[1] - 1), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_module_whose_input_needs_no_gradient_learns_as_well() -> None:
    module = nn.Linear(3, 4).requires_grad_(False)
    slope_a, slope_b = torch.zeros(1, 3), torch.zeros(4, 1)
    add_product(module, torch.ones(1, 3), torch.ones(4, 1), slope_a, slope_b)
    module(torch.ones(2, 3)).sum().backward()
    assert slope_a.any()
    assert slope_b.any()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_beside_and_inside_give_the_same_states_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool, kind: str
) -> None:
    model = saved(kind, tmp_path / "model", dtype=torch.float32)
    beside = setting(model, tmp_path, rank=1, streamed=streamed)
    monkeypatch.setattr(lora_parameters, "acts_beside", lambda matrix, rank: False)
    inside = setting(model, tmp_path, rank=1, streamed=streamed)
    assert any(isinstance(stack, LoraPairsBeside) for layer in range(2) for stack in beside.bank.stacks(layer))
    assert all(type(stack) is not LoraPairsBeside for layer in range(2) for stack in inside.bank.stacks(layer))
    states = [_learned(each) for each in (beside, inside)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(beside.bank.gradient, inside.bank.gradient, rtol=1e-3, atol=1e-6)


def test_small_changes_of_16_bit_weights_are_not_swallowed(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "model", dtype=torch.float32)
    found = setting(model, tmp_path, rank=4, dtype=torch.bfloat16)
    linear = [stack for layer in range(2) for stack in found.bank.stacks(layer) if isinstance(stack, LoraPairs)]
    assert linear
    assert all(isinstance(stack, LoraPairsBeside) for stack in linear)


def _learned(found: Setting) -> torch.Tensor:
    disturb(found.bank)
    text = made_up_text(4, 7)
    batches = [text.take(np.arange(4), torch.device("cpu"))]
    found.bank.gradient.zero_()
    found.engine.accumulate_gradients(batches, found.head, text.places(np.arange(4)))
    return torch.cat(list(found.engine.states(batches)))
