"""Quantised checkpoints are refused: their codes are never read as weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.checkpoints import open_checkpoint, refuse_quantised
from moe_svd_distill.errors import BadDataError
from tests.checkpoints.builders import CONFIG, tiny_tensors, write_model


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "quant_method=fp8"),
        ({"quantization_config": {"format": "pack-quantized"}}, "quant_method=pack-quantized"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "quant_method=mxfp4"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization quant_method=None"),
        ({"quantization_config": "something"}, "quant_method=something"),
        ({"quantization_config": {"quant_method": ["\x1b[2J"]}}, "\\x1b"),
        ({"quantization_config": {"quant_method": "\x1b[2J"}}, "\\x1b"),
    ],
)
def test_by_configuration(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    write_model(tmp_path, config=CONFIG | config)
    with pytest.raises(BadDataError) as caught:
        open_checkpoint(tmp_path)
    assert "quantised checkpoints are not read yet" in caught.value.what
    assert words in caught.value.what
    assert caught.value.action == "Give the bf16 checkpoint"
    assert caught.value.exit_code == 65
    assert len(open_checkpoint(tmp_path, allow_quantised=True)) == len(tiny_tensors())


@pytest.mark.parametrize(
    "extra",
    [
        {"a.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)},
        {"a.weight": torch.zeros(2, 2, dtype=torch.float8_e5m2)},
        {"a.weight": torch.zeros(2, 2, dtype=torch.int8)},
        {"a.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 2, dtype=torch.uint8)},
        {"a.weight": torch.zeros(2, 2, dtype=torch.uint32)},
        {"a.weight_scale_inv": torch.zeros(1)},
        {"a.qweight": torch.zeros(2, 2, dtype=torch.int32)},
        {"a.weight_packed": torch.zeros(2, 2, dtype=torch.int32)},
        {"a.weight.absmax": torch.zeros(2)},
    ],
)
def test_by_tensor(tmp_path: Path, extra: dict[str, torch.Tensor]) -> None:
    write_model(tmp_path, tensors=tiny_tensors() | extra, shards=2)
    with pytest.raises(BadDataError, match="quantised checkpoints are not read yet") as caught:
        open_checkpoint(tmp_path)
    assert next(iter(extra)) in caught.value.what


@pytest.mark.parametrize("empty", [None, {}, False])
def test_plain_models_pass(tmp_path: Path, empty: object) -> None:
    plain = {"model.position_ids": torch.arange(4), "model.mask": torch.ones(2, dtype=torch.bool)}
    write_model(tmp_path, tensors=tiny_tensors() | plain, config=CONFIG | {"quantization_config": empty})
    refuse_quantised(open_checkpoint(tmp_path))
