"""Quantised tensors and the configurations they come with on the hub, and what they mean, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from tests.checkpoints.builders import CONFIG, write_model

QWEN3_FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"],
}
E4M3_LARGEST = 448.0


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def quantised_model(
    folder: Path, tensors: dict[str, Tensor], quantisation: Any, *, shards: int = 1, **config: Any
) -> Path:
    """Write a model with a ``quantization_config``."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    fields = CONFIG | {"dtype": "bfloat16", "quantization_config": quantisation} | config
    return write_model(folder, tensors=contiguous, config=fields, shards=shards)


def opened(folder: Path, tensors: dict[str, Tensor], quantisation: Any, **config: Any) -> Checkpoint:
    """The same, written and opened; every byte has to be accounted for."""
    checkpoint = open_checkpoint(quantised_model(folder, tensors, quantisation, **config))
    account(checkpoint)
    return checkpoint


def account(checkpoint: Checkpoint) -> None:
    """Every stored tensor is a weight, a part of one, or set aside; and every byte is counted once."""
    stored = set(checkpoint.stored)
    parts, aside = set(checkpoint.companions), set(checkpoint.set_aside)
    assert not parts & aside
    assert set(checkpoint.companions.values()) <= set(checkpoint)
    assert stored == (stored & set(checkpoint)) | parts | aside
    own = sum(info.bytes for info in checkpoint.values())
    assert own + sum(checkpoint.stored[name].bytes for name in aside) == checkpoint.total_bytes
    assert checkpoint.total_bytes == sum(info.bytes for info in checkpoint.stored.values())


def expand(grid: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
    """Each element's own entry of a grid of blocks, by its index alone."""
    for axis, (length, side) in enumerate(zip(shape, block, strict=True)):
        grid = grid.index_select(axis, torch.arange(length) // side)
    return grid


def float8_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A weight in e4m3 with one scale per block, as DeepSeek-V3 was published: codes, ``weight_scale_inv``."""
    rows, columns = weight.shape
    grid = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            grid[i, j] = part.abs().max() / E4M3_LARGEST
    scales = expand(grid, (rows, columns), block)
    return (weight / scales).to(torch.float8_e4m3fn), grid


def same(read: Tensor, expected: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """The weight is exactly the float64 value, rounded to float32 and then to its own dtype."""
    assert read.dtype == dtype
    assert read.shape == expected.shape
    assert torch.equal(read, expected.float().to(dtype))


def pack_words(integers: Tensor, bits: int) -> Tensor:
    """Unsigned integers ``(rows, columns)`` into int32 words along a row, bit after bit, ``(rows, words)``."""
    rows, columns = integers.shape
    stream = torch.zeros(rows, -(-columns * bits // 32) * 32, dtype=torch.int64)
    for bit in range(bits):
        stream[:, torch.arange(columns) * bits + bit] = (integers.long() >> bit) & 1
    words = (stream.view(rows, -1, 32) << torch.arange(32)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
