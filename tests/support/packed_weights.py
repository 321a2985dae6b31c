"""Small tensors packed the way GPTQ, AWQ, AutoRound and bitsandbytes pack them, with the settings they write."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from tests.support.quantisers import pack_words, seeded

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
GPTQ: dict[str, Any] = {
    "bits": 4,
    "checkpoint_format": "gptq",
    "damp_percent": 0.01,
    "desc_act": True,
    "group_size": 32,
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:4.0.0"]},
    "quant_method": "gptq",
    "sym": False,
    "true_sequential": True,
}
AWQ: dict[str, Any] = {
    "bits": 4,
    "group_size": 32,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
NF4: dict[str, Any] = {
    "_load_in_4bit": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": ["lm_head"],
    "load_in_4bit": True,
    "quant_method": "bitsandbytes",
}


def integers(*shape: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=seeded(seed))


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def gptq_tensors(
    codes: Tensor, zero: Tensor, scale: Tensor, index: Tensor | None, bits: int, v1: bool
) -> dict[str, Tensor]:
    """``codes (in, out)``, ``zero`` and ``scale (groups, out)``, as auto-gptq packs them."""
    stored = (zero - 1) % 2**bits if v1 else zero
    tensors = {
        f"{MODULE}.qweight": pack_words(codes.T, bits).T,
        f"{MODULE}.qzeros": pack_words(stored, bits),
        f"{MODULE}.scales": scale,
    }
    return tensors | ({} if index is None else {f"{MODULE}.g_idx": index.to(torch.int32)})


def affine(codes: Tensor, zero: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """``(out, in)``, float64."""
    return ((codes.double() - zero.double()[index]) * scale.double()[index]).T


def awq_words(values: Tensor) -> Tensor:
    """``(rows, columns)`` to ``(rows, columns/8)``, as AutoAWQ's WQLinear_GEMM packs."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        words |= values[:, column::8].long() << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def auto_round(packing: str | None, **others: Any) -> dict[str, Any]:
    """As AutoRound 0.16 writes it; without a packing, as its first versions did."""
    settings_: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
    settings_ |= {"data_type": "int", "autoround_version": "0.16.1", "block_name_to_quantize": "model.layers"}
    return settings_ | ({} if packing is None else {"packing_format": packing}) | others


def four_bits(shape: tuple[int, ...], block: int, nested: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """Random codes with a random codebook, as ``QuantState.as_dict(packed=True)`` names them; and the numbers."""
    count = torch.Size(shape).numel()
    scales = -(-count // block)
    codes = torch.randint(0, 16, (count + count % 2,), dtype=torch.uint8, generator=seeded(2))
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    book = torch.randn(16, generator=seeded(3))
    tensors = {NAME: (codes[0::2] << 4 | codes[1::2])[:, None], f"{NAME}.quant_map": book}
    absmax = torch.rand(scales, generator=seeded(4)).double()
    if nested is None:
        tensors[f"{NAME}.absmax"] = absmax.float()
        absmax = absmax.float().double()
    else:
        small, outer = random_bytes(scales, seed=5), torch.rand(-(-scales // nested), generator=seeded(6))
        levels = torch.randn(256, generator=seeded(7))
        tensors |= {f"{NAME}.absmax": small, f"{NAME}.nested_absmax": outer, f"{NAME}.nested_quant_map": levels}
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.25}
        absmax = levels.double()[small.long()] * outer.double()[torch.arange(scales) // nested] + 0.25
    raw = bytearray(json.dumps(state).encode())
    tensors[f"{NAME}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(raw, dtype=torch.uint8)
    values = book.double()[codes[:count].long()] * absmax[torch.arange(count) // block]
    return tensors, values.view(shape)
