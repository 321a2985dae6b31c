"""Tiny models as they are stored quantised."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_svd_distill.checkpoints import open_checkpoint
from tests.support.quantisers import (
    QWEN3_FP8,
    deepseek_fp4,
    expand,
    exponents_of,
    float8_blocks,
    in_groups,
    largest_of_groups,
    mxfp8,
    nvfp4,
    pack_words,
)

BLOCK = (32, 24)  # ragged on most of the tiny shapes
GROUP = 16
FP8 = QWEN3_FP8 | {"weight_block_size": list(BLOCK)}
LINEAR = re.compile(r"\.(\w+_proj|w[123]|wq_[ab]|wkv|wo_[ab])\.weight")


def _float8(module: str, weight: Tensor) -> dict[str, Tensor]:
    codes, scale = float8_blocks(weight, BLOCK)
    return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}


def _deepseek_v4(module: str, weight: Tensor) -> dict[str, Tensor]:
    if ".experts." in module:
        codes, scale = deepseek_fp4(weight)
    else:
        _, grid = float8_blocks(weight, BLOCK)
        exponents = exponents_of(grid)
        scale = exponents.view(torch.float8_e8m0fnu)
        codes = (weight / expand(torch.exp2(exponents.float() - 127), weight.shape, BLOCK)).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.scale": scale}


def _mxfp8(module: str, weight: Tensor) -> dict[str, Tensor]:
    codes, exponents = mxfp8(weight)
    return {f"{module}.weight": codes, f"{module}.weight_scale_inv": exponents}


def _nvfp4(module: str, weight: Tensor) -> dict[str, Tensor]:
    codes, scale, second = nvfp4(weight)
    tensors = {f"{module}.weight": codes, f"{module}.weight_scale": scale, f"{module}.weight_scale_2": second}
    return tensors | {f"{module}.input_scale": torch.ones(())}


def _auto_round(module: str, weight: Tensor) -> dict[str, Tensor]:
    """Symmetric, as most are: the zero point is 8, stored as 7."""
    scale = (largest_of_groups(weight, GROUP) / 7).half()
    codes = (weight / in_groups(scale.float(), weight.shape, GROUP)).round().clamp(-8, 7) + 8
    tensors = {f"{module}.qweight": pack_words(codes, 4).T, f"{module}.scales": scale.T}
    return tensors | {f"{module}.qzeros": pack_words(torch.full_like(scale.T, 7), 4)}


Writer = Callable[[str, Tensor], dict[str, Tensor]]
SCHEMES: dict[str, tuple[Writer, dict[str, Any]]] = {
    "fp8": (_float8, FP8),
    "deepseek_v4": (_deepseek_v4, FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"}),
    "mxfp8": (_mxfp8, {"quant_method": "mxfp8", "ignored_layers": ["lm_head"]}),
    "nvfp4": (_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": []}),
    "auto_round": (
        _auto_round,
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": True}
        | {"data_type": "int", "packing_format": "auto_round:auto_gptq"},
    ),
}
"""How a linear layer is stored, and what config.json says of it."""


def quantised_copy(model: Path, folder: Path, scheme: str) -> Path:
    """A copy of a model with its linear layers quantised."""
    shutil.copytree(model, folder)
    write, config = SCHEMES[scheme]
    tensors: dict[str, Tensor] = {}
    with open_checkpoint(model) as checkpoint:
        for name in checkpoint:
            tensor = checkpoint.read(name)
            linear = tensor.ndim == 2 and LINEAR.search(name)
            tensors |= write(name.removesuffix(".weight"), tensor.float()) if linear else {name: tensor}
    _save(tensors, folder)
    declare(folder, config)
    return folder


def in_float8(model: Path, folder: Path) -> Path:
    """A copy of a model with its linear layers in FP8 blocks, as Qwen3-30B-A3B-FP8 is stored."""
    return quantised_copy(model, folder, "fp8")


def plain_copy(model: Path, folder: Path) -> Path:
    """A copy of a quantised model that stores its dequantised numbers plainly."""
    shutil.copytree(model, folder)
    with open_checkpoint(model) as checkpoint:
        _save({name: checkpoint.read(name) for name in checkpoint}, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def declare(folder: Path, quantisation: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
