"""Visitors see a layer and its inputs, and may change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moe_svd_distill.streaming import LayerVisit, PassSettings, stream_states
from tests.streaming.conftest import LENGTH, Case, outcome, resident

Ids = NDArray[np.int64]
SETTINGS = PassSettings(batch_tokens=2 * LENGTH)
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@torch.no_grad()
def inputs_of(module_of: Callable[[int], Any], model: Any, sequences: Ids, layers: int = 3) -> list[torch.Tensor]:
    """What a module of each layer of a whole model is given."""
    found: list[torch.Tensor] = []
    handles = [
        module_of(index).register_forward_pre_hook(lambda _, arguments: found.append(arguments[0].clone()))
        for index in range(layers)
    ]
    outcome(model, sequences)
    for handle in handles:
        handle.remove()
    return found[:layers]


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu")])
def test_sees_every_layer_and_its_inputs(case: Case, sequences: Ids, tmp_path: Path, devices: tuple[str, ...]) -> None:
    model = resident(case.folder)
    expected = inputs_of(lambda index: model.model.layers[index], model, sequences)
    into_o = inputs_of(lambda index: model.model.layers[index].self_attn.o_proj, model, sequences)
    seen: list[str] = []

    def visit(layer: LayerVisit) -> None:
        gathered: list[torch.Tensor] = []
        handle = layer.layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: gathered.append(given[0]))
        batches = list(layer.batches())
        hidden = torch.cat([arguments[0] for _, (arguments, _) in batches])
        with torch.no_grad():
            for _, (arguments, keywords) in batches:
                layer.layer(*arguments, **keywords)
        handle.remove()
        torch.testing.assert_close(hidden, expected[layer.index], **ROUNDING)
        torch.testing.assert_close(torch.cat(gathered), into_o[layer.index], **ROUNDING)
        assert [rows for rows, _ in batches] == [slice(0, 2), slice(2, 4), slice(4, 5)]
        seen.append(layer.name)

    settings = PassSettings(devices, batch_tokens=SETTINGS.batch_tokens)
    result = stream_states(case.checkpoint, sequences, tmp_path, settings, visit=visit)
    assert seen == [f"model.layers.{index}" for index in range(3)]
    torch.testing.assert_close(result.rows(slice(None)), outcome(model, sequences)[0], **ROUNDING)


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu")])
def test_changes_take_effect(sparse: Case, sequences: Ids, tmp_path: Path, devices: tuple[str, ...]) -> None:
    model = resident(sparse.folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()

    def visit(layer: LayerVisit) -> None:
        if layer.index == 1:
            layer.layer.self_attn.o_proj.weight.data.zero_()

    settings = PassSettings(devices, batch_tokens=SETTINGS.batch_tokens)
    result = stream_states(sparse.checkpoint, sequences, tmp_path, settings, visit=visit)
    torch.testing.assert_close(result.rows(slice(None)), outcome(model, sequences)[0], **ROUNDING)
    untouched = stream_states(sparse.checkpoint, sequences, tmp_path, settings)
    assert untouched.path != result.path
    torch.testing.assert_close(untouched.rows(slice(None)), outcome(resident(sparse.folder), sequences)[0], **ROUNDING)


def test_a_visitor_without_a_name_sees_everything_each_time(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    seen: list[int] = []
    for _ in range(2):
        stream_states(sparse.checkpoint, sequences, tmp_path, SETTINGS, visit=lambda layer: seen.append(layer.index))
    assert seen == [0, 1, 2, 0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_visitor_with_a_name_goes_on_where_it_was(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    seen: list[int] = []

    def visit(layer: LayerVisit) -> None:
        if layer.index == 1 and len(seen) == 1:
            seen.append(-1)
            raise KeyboardInterrupt
        seen.append(layer.index)

    with pytest.raises(KeyboardInterrupt):
        stream_states(sparse.checkpoint, sequences, tmp_path, SETTINGS, visit=visit, visit_key="statistics")
    for _ in range(2):
        stream_states(sparse.checkpoint, sequences, tmp_path, SETTINGS, visit=visit, visit_key="statistics")
    assert seen == [0, -1, 1, 2]
