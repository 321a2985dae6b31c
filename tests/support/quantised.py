"""Tiny models as they are stored quantised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.quantisers import QWEN3_FP8, float8_blocks

BLOCK = (32, 24)  # ragged on most of the tiny shapes
FP8 = QWEN3_FP8 | {"weight_block_size": list(BLOCK)}


def in_float8(model: Path, folder: Path) -> Path:
    """A copy of a model with its linear layers in FP8 blocks, as Qwen3-30B-A3B-FP8 is stored."""
    shutil.copytree(model, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor
        if "_proj" in name and tensor.ndim == 2:
            tensors[name], tensors[f"{name}_scale_inv"] = float8_blocks(tensor.float(), BLOCK)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    declare(folder, FP8)
    return folder


def declare(folder: Path, quantisation: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
