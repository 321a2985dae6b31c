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


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
"""The numbers of four bits; a test holds them against the formula of OCP Microscaling Formats 1.0."""
E2M1_LARGEST = 6.0


def unpack_fp4(codes: Tensor) -> Tensor:
    """Two numbers of each byte, the first in the low half, one after the other in a row, in float64."""
    numbers = codes.view(torch.uint8).long()
    pairs = torch.stack([E2M1[numbers % 16], E2M1[numbers // 16]], dim=-1)
    return pairs.view(*codes.shape[:-1], 2 * codes.shape[-1])


def pack_fp4(numbers: Tensor) -> Tensor:
    """The nearest number of four bits for each, two to a byte."""
    codes = (numbers.double()[..., None] - E2M1).abs().argmin(-1)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def largest_of_groups(weight: Tensor, group: int) -> Tensor:
    """The largest magnitude in each group of a row; the last one may be ragged."""
    return torch.stack([part.abs().amax(-1) for part in weight.split(group, dim=-1)], dim=-1)


def exponents_of(scale: Tensor) -> Tensor:
    """The biased exponents of the powers of two that are not below the scales, in bytes."""
    return (scale.clamp_min(2.0**-100).log2().ceil() + 127).to(torch.uint8)


def deepseek_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """An expert of DeepSeek-V4: codes in I8, scales as E8M0."""
    exponents = exponents_of(largest_of_groups(weight, 32) / E2M1_LARGEST)
    scale = in_groups(torch.exp2(exponents.double() - 127), weight.shape, 32)
    return pack_fp4(weight.double() / scale).view(torch.int8), exponents.view(torch.float8_e8m0fnu)


def nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight as modelopt stores it: codes, ``weight_scale``, ``weight_scale_2``."""
    second = weight.abs().max() / (E2M1_LARGEST * E4M3_LARGEST)
    scale = (largest_of_groups(weight, 16) / E2M1_LARGEST / second).to(torch.float8_e4m3fn)
    whole = in_groups(scale.double(), weight.shape, 16) * second.double()
    return pack_fp4(weight.double() / whole.clamp_min(1e-30)), scale, second


def mxfp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in e4m3, and the exponents of its groups of 32 in bytes."""
    exponents = exponents_of(largest_of_groups(weight, 32) / E4M3_LARGEST)
    scale = in_groups(torch.exp2(exponents.float() - 127), weight.shape, 32)
    return (weight / scale).to(torch.float8_e4m3fn), exponents


def in_groups(scale: Tensor, shape: tuple[int, ...], group: int) -> Tensor:
    """Each number's own scale, of scales for groups of columns."""
    return expand(scale, shape, (*(1,) * (len(shape) - 1), group))
