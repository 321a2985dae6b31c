"""The numbers of weights in a GGUF file, some rows at a time, by the dequantiser of the package `gguf`.

It computes on the CPU in float32, whatever the device of the result.
"""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.checkpoints.quantisation.coded import Coded, Ggml, Part
from moe_svd_distill.files.dtypes import FLOATS

SLAB_ELEMENTS = 1 << 20

Parts = Mapping[Part, Tensor]


def decode_ggml(coding: Ggml, parts: Parts, out: Tensor, begin: int, coded: Coded) -> None:
    """Write rows of a weight from ``begin`` on; the parts are numbers, or the bytes of the blocks of each row."""
    step = max(1, SLAB_ELEMENTS // max(1, out[0].numel()))
    for first in range(begin, begin + out.shape[0], step):
        last = min(begin + out.shape[0], first + step)
        out[first - begin : last - begin] = _rows(coded, coding, parts, first, last)


def _rows(coded: Coded, coding: Ggml, parts: Parts, first: int, last: int) -> Tensor:
    codes = parts["codes"]
    kinds = {part: info.dtype for part, info in coded.parts.items()}
    match coding.arrangement:
        case "turned":
            return _numbers(codes[_turned(torch.arange(first, last), codes.shape[0] // coding.heads)], kinds["codes"])
        case "latent":
            return _latent(parts, kinds, first, last)
        case "interleaved":
            both = [_numbers(parts[part][first:last], kinds[part]).float() for part in ("codes", "second")]
            return torch.stack([found.mT if found.ndim == 3 else found for found in both], dim=-1).flatten(-2)
    found = _numbers(codes[first:last], kinds["codes"])
    if coding.arrangement == "less_one":
        return found.float() - 1
    return found.mT if coding.arrangement == "transposed" else found


def _numbers(stored: Tensor, kind: str) -> Tensor:
    """What blocks say, in float32; floats as they are."""
    if kind in FLOATS:
        return stored
    with np.errstate(all="ignore"):  # what is no number is found and named by those who read it
        return torch.from_numpy(gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind]))


def _turned(rows: Tensor, size: int) -> Tensor:
    """Where rows of the weight are stored, in heads of this size."""
    head, within = rows // size, rows % size
    return head * size + within % (size // 2) * 2 + within // (size // 2)


def _latent(parts: Parts, kinds: Mapping[Part, str], first: int, last: int) -> Tensor:
    """Rows of the heads one after the other: a head's keys, stored transposed, and then its values."""
    keys, values = parts["codes"], parts["second"]
    sample = _numbers(keys[:1], kinds["codes"])
    size = sample.shape[-1] + values.shape[1]
    heads = slice(first // size, -(-last // size))
    both = (_numbers(keys[heads], kinds["codes"]).mT.float(), _numbers(values[heads], kinds["second"]).float())
    rows = torch.cat(both, dim=1).flatten(0, 1)
    return rows[first - heads.start * size : last - heads.start * size]
