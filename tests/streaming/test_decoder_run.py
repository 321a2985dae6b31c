"""What the probes of a decoder hold in memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.architecture.skeleton import ENDS, build_skeleton
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.streaming.decoder_run import DecoderRun
from moe_svd_distill.streaming.weights import Weights
from tests.support.models import saved

CPU = torch.device("cpu")


def test_noise_of_one_layer_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep model over a wide batch would otherwise hold more noise than a layer has weights."""
    checkpoint = open_checkpoint(saved("llama", tmp_path / "model", num_hidden_layers=6))
    skeleton = build_skeleton(checkpoint.config, checkpoint.source, torch.float32, "cpu")
    weights = Weights(checkpoint, skeleton, CheckpointMap(checkpoint, skeleton), None, CPU)
    weights.attach(ENDS, weights.read(ENDS))
    run = DecoderRun(skeleton, CPU, 16)
    drawn: list[weakref.ref[torch.Tensor]] = []
    most = 0
    draw = torch.randn

    def counted(*arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal most
        found = draw(*arguments, **keywords)
        drawn.append(weakref.ref(found))
        most = max(most, sum(each() is not None for each in drawn))
        return found

    monkeypatch.setattr(torch, "randn", counted)
    assert len(run.calls(2)) == 6
    assert len(drawn) >= 6
    assert most <= 3  # what goes in, what comes out, and what the decoder itself still names
