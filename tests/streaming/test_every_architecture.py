"""Whatever transformers builds is run layer by layer as it runs whole, forward and backward, and from any layer on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_svd_distill.adapter.adapter_file import sha256_of
from moe_svd_distill.architecture.building import find_decoder
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.streaming import Decoder, PassSettings, stream_states
from moe_svd_distill.training.engine import ResidentEngine, StreamedEngine
from moe_svd_distill.training.text import Batch
from tests.support.architectures import every_type, load, saved, tokens

CPU = torch.device("cpu")
LENGTH = 12
IDS = tokens(5, LENGTH)
SETTINGS = PassSettings(batch_tokens=2 * LENGTH)  # two batches of two and one of one
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(params=every_type(), scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model type after the other."""
    return saved(request.param, tmp_path_factory.mktemp("model") / "model")


def final_states(whole: nn.Module, ids: Tensor) -> Tensor:
    output: Any = find_decoder(whole)[0](input_ids=ids, use_cache=False)
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


class KilledError(Exception):
    """Stands for the end of a process."""


def test_killed_after_every_layer_a_pass_ends_in_the_states_of_the_whole_model(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    with torch.no_grad():
        expected = final_states(load(model), IDS)
    peaceful = stream_states(checkpoint, IDS.numpy(), tmp_path / "peaceful", SETTINGS)
    torch.testing.assert_close(peaceful.rows(slice(None)), expected, **ROUNDING)
    begun_at, spilled = [], replace(SETTINGS, activation_bytes=0)
    for killed_at in range(1, peaceful.record.layers):

        def kill(done: int, layers: int, last: int = killed_at) -> None:
            begun_at.extend([done] if done < last else [])
            if done == last:
                raise KilledError

        with pytest.raises(KilledError):
            stream_states(checkpoint, IDS.numpy(), tmp_path / "killed", spilled, on_progress=kill)
    ended = stream_states(checkpoint, IDS.numpy(), tmp_path / "killed", SETTINGS)
    assert begun_at == list(range(peaceful.record.layers - 1))
    assert ended.record.layers_computed == 1
    assert not peaceful.record.spilled
    assert sha256_of(ended.path) == sha256_of(peaceful.path)


def test_the_last_layers_run_on_any_of_the_recorded_sequences(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    layers = Decoder(checkpoint, (CPU,)).layers
    for first in range(1, layers):
        states = stream_states(checkpoint, IDS.numpy(), tmp_path, replace(SETTINGS, record_at=first))
        assert states.inputs is not None
        decoder = Decoder(checkpoint, (CPU,))
        decoder.knows_inputs(states.inputs)
        decoder.enter_all(first)
        for rows in (slice(1, 4), slice(4, 5), slice(0, 1)):
            with torch.no_grad():
                found = decoder.states(IDS[rows], first, [tensor.clone() for tensor in states.inputs.rows(rows)])
            torch.testing.assert_close(found, states.rows(rows), **ROUNDING)
        decoder.close()


class _Gradients:
    """In the place of a bank of factors: collects the gradient by every parameter of the layers."""

    def __init__(self, decoder: Decoder) -> None:
        self._skeleton = decoder.skeleton
        self.found: dict[tuple[int, str], Any] = defaultdict(float)
        self._hooked: set[nn.Parameter] = set()

    def bases(self, layer: int) -> list[list[Tensor]]:
        return []

    def compose(self, layer: int, bases: object = None) -> None:
        """Nothing is added to the weights."""

    def hook_gradients(self, layer: int) -> None:
        for slot in self._skeleton.of_part(layer):
            parameter: Any = slot.module._parameters.get(slot.attribute)
            if parameter is None or parameter in self._hooked or not parameter.is_floating_point():
                continue
            self._hooked.add(parameter)  # a parameter may have several names
            key = id(slot.module), slot.attribute

            def take(it: Tensor, key: tuple[int, str] = key) -> None:
                self.found[key] = self.found[key] + it.grad
                it.grad = None

            parameter.requires_grad_(True).register_post_accumulate_grad_hook(take)

    def by_name(self) -> dict[str, Tensor]:
        """Name to gradient; one that has several names counts for the first of them."""
        names = {(id(slot.module), slot.attribute): name for name, slot in reversed(self._skeleton.slots.items())}
        return {names[key]: gradient for key, gradient in self.found.items()}


class _Slopes:
    """In the place of a head: the slopes of a random linear function."""

    def accumulate_gradients(self, states: Tensor, batch: Batch, places: int) -> Tensor:
        return batch.teacher


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "resident"])
def test_gradients_are_those_of_the_whole_model(model: Path, tmp_path: Path, streamed: bool) -> None:
    whole = load(model)
    states = final_states(whole.requires_grad_(True), IDS)
    slopes = torch.randn(states.shape, generator=torch.Generator().manual_seed(5))
    (states * slopes).sum().backward()
    decoder = Decoder(open_checkpoint(model), (CPU,), gradients=True)
    bank: Any = _Gradients(decoder)
    if streamed:
        engine: Any = StreamedEngine(decoder, bank, tmp_path)
    else:
        decoder.enter_all()
        engine = ResidentEngine(decoder, bank)
    everywhere = torch.arange(2 * LENGTH)
    batches = [
        Batch(IDS[rows], everywhere[: IDS[rows].numel()], slopes[rows].flatten(0, 1), everywhere)
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5))
    ]
    engine.accumulate_gradients(batches, _Slopes(), IDS.numel())
    names: dict[nn.Parameter, list[str]] = defaultdict(list)  # some architectures tie parameters of several layers
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        if name in decoder.skeleton.slots and isinstance(decoder.skeleton.slots[name].part, int):
            names[parameter].append(name)
    found = bank.by_name()
    for parameter, of_parameter in names.items():
        if parameter.grad is None or not parameter.grad.any():
            continue
        size = float(parameter.grad.abs().max())
        mine = sum(found.get(name, torch.zeros(())) for name in of_parameter)
        torch.testing.assert_close(mine, parameter.grad, rtol=2e-3, atol=2e-3 * size, msg=of_parameter[0])
    decoder.close()
