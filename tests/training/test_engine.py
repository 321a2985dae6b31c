"""Gradients of the factors: against autograd through PEFT's own layers, and streamed against resident."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moe_svd_distill.training.lora_pairs import FullDeltas, LoraPairs
from tests.support.models import load, saved
from tests.support.training import CPU, LENGTH, Setting, disturb, made_up_text, pairs_of, setting

FAMILIES = ("qwen3_moe", "llama", "qwen3", "mixtral", "glm4_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("model") / "student", dtype=torch.float32)


def _learn(found: Setting) -> tuple[torch.Tensor, torch.Tensor, float]:
    text = made_up_text(6, seed=1)
    batches = [text.take(rows, CPU) for rows in (np.array([4, 1]), np.array([0]), np.array([5, 3, 2]))]
    found.engine.accumulate_gradients(batches, found.head, len(text.position))
    return found.bank.gradient.clone(), found.head.gradient.clone(), float(found.head.loss)


@pytest.mark.parametrize("rank", [4, 12, 100])
def test_gradients_are_those_of_autograd_through_composed_weights(model: Path, tmp_path: Path, rank: int) -> None:
    found = setting(model, tmp_path, rank=rank)
    disturb(found.bank)
    gradient, head_gradient, loss = _learn(found)
    text = made_up_text(6, seed=1)
    plain = load(model)
    plain.set_experts_implementation("eager")
    changes = {name: (b.clone().requires_grad_(), a.clone().requires_grad_()) for name, (b, a) in pairs_of(found.bank)}
    weights = {matrix.name: matrix for matrix in found.decoder.matrices}
    parameters = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for name, (b, a) in changes.items():
        place = weights[name].slot.name
        whole = torch.zeros_like(parameters[place])
        mask = weights[name].piece.within(whole)
        pad = torch.zeros_like(whole)
        weights[name].piece.within(pad).fill_(1)
        assert mask.shape == (b @ a).shape
        parameters[place] = parameters[place] + _placed(pad, b @ a)
    delta = torch.zeros_like(found.student.weight, requires_grad=True)
    ids = torch.from_numpy(text.ids)
    states = torch.func.functional_call(plain.model, _inside(parameters), (), {"input_ids": ids, "use_cache": False})
    hidden = states.last_hidden_state.flatten(0, 1)[torch.from_numpy(text.position)]
    logits = hidden @ (found.student.weight + delta).T
    teacher = text.teacher[torch.from_numpy(text.teacher_position)] @ found.teacher.weight.T
    wanted = nn.functional.kl_div(
        torch.log_softmax(logits, -1), torch.log_softmax(teacher, -1), log_target=True, reduction="none"
    )
    mean = wanted.sum(-1).mean()
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-4)
    for name, (b, a) in changes.items():
        assert b.grad is not None
        assert a.grad is not None
        slopes = _slopes(found, name, gradient)
        moving = a.grad if len(b) <= a.shape[1] else b.grad  # where the other one is the identity and stands still
        wanted = [b.grad, a.grad] if len(slopes) == 2 else [moving]
        for mine, theirs in zip(slopes, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-6)
    assert delta.grad is not None
    whitened = delta.grad @ found.head._metric.inverse
    torch.testing.assert_close(head_gradient.view_as(whitened), whitened, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("budget", [None, 0])
def test_streamed_is_resident_to_rounding(model: Path, tmp_path: Path, budget: int | None) -> None:
    resident, streamed = setting(model, tmp_path), setting(model, tmp_path, streamed=True, budget=budget)
    for found in (resident, streamed):
        disturb(found.bank)
    for mine, theirs in zip(_learn(resident)[:2], _learn(streamed)[:2], strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-7)
    text = made_up_text(4, seed=2)
    batches = [text.take(np.array([0, 2]), CPU), text.take(np.array([1, 3]), CPU)]
    for mine, theirs in zip(resident.engine.states(batches), streamed.engine.states(batches), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("inputs-*"))


def test_a_streamed_step_reads_every_layer_twice_but_the_last(model: Path, tmp_path: Path) -> None:
    found = setting(model, tmp_path, streamed=True)
    text = made_up_text(4, seed=1)
    before = found.decoder.bytes_read
    found.engine.accumulate_gradients(text.batches(2 * LENGTH, CPU), found.head, len(text.position))
    layers = [found.decoder.stored.bytes_of(layer) for layer in range(found.decoder.layers)]
    rows = len(np.unique(text.ids)) * 4 * found.student.weight.shape[1]
    assert found.decoder.bytes_read - before == 2 * sum(layers) - layers[-1] + rows


def _inside(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): value for name, value in parameters.items() if name.startswith("model.")}


def _placed(pad: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The change at the places that are marked, zeros elsewhere, with gradients."""
    return torch.zeros_like(pad).masked_scatter(pad.bool(), change)


def _slopes(found: Setting, name: str, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Gradients by B and A, or by the whole change."""
    found.bank.gradient.copy_(gradient)
    for layer in range(found.decoder.layers):
        for stack in found.bank.stacks(layer):
            for place, weight in enumerate(stack.weights):
                if weight.name == name:
                    if isinstance(stack, LoraPairs):
                        return [stack.slope_b[place], stack.slope_a[place]]
                    assert isinstance(stack, FullDeltas)
                    return [stack.slope[place]]
    raise KeyError(name)
