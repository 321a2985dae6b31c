"""Codes of a few bits, as they lie in bytes and words, to numbers. Pure functions; the tests hold them against the
libraries that wrote the formats."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float32, Int32, Shaped, UInt8
from torch import Tensor

WORD = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float; bit 3 is the sign. OCP Microscaling Formats 1.0, table 5."""


def unpack_words(words: Int32[Tensor, "rows words"], bits: int, count: int) -> Float32[Tensor, "rows count"]:
    """Unsigned integers packed densely into 32-bit words, the first in the lowest bits.

    Args:
        words: A row's words in order.
        bits: Bits per integer, 1 to 8.
        count: Integers per row.
    """
    if 8 % bits == 0:
        return look_up(_integers_of_byte(bits).to(words.device), words.contiguous().view(torch.uint8))[:, :count]
    begin = torch.arange(count, device=words.device) * bits
    wide = torch.cat([words, words.new_zeros(words.shape[0], 1)], dim=1).long() & 0xFFFFFFFF
    low = wide[:, begin // WORD] >> (begin % WORD)
    high = wide[:, begin // WORD + 1] << (WORD - begin % WORD)
    return ((low | high) & (2**bits - 1)).float()


def unpack_e2m1(codes: UInt8[Tensor, "rows bytes"]) -> Float32[Tensor, "rows two_per_byte"]:
    """4-bit floats, two to a byte, the first in the low half."""
    return look_up(_e2m1_of_byte().to(codes.device), codes)


def look_up(
    table: Float32[Tensor, "256 per_byte"], codes: UInt8[Tensor, "rows bytes"]
) -> Float32[Tensor, "rows codes"]:
    """The entries of a table for each byte, one after the other."""
    rows, width = codes.shape
    return table.index_select(0, codes.reshape(-1).int()).view(rows, width * table.shape[1])


def pairs_high_first(values: Float32[Tensor, "16"]) -> Float32[Tensor, "256 2"]:
    """A table for ``look_up`` from the values of 4-bit codes, the first of the two in the high half of a byte."""
    byte = torch.arange(256, device=values.device)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1)


def float32(scale: Shaped[Tensor, "*grid"], *, exponents: bool = False) -> Float32[Tensor, "*grid"]:
    """Scales in float32; bytes that are exponents mean ``2**(byte - 127)``, and 255 means NaN."""
    return (scale.view(torch.float8_e8m0fnu) if exponents and scale.dtype is torch.uint8 else scale).float()


@cache
def _integers_of_byte(bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits)
    return ((torch.arange(256)[:, None] >> shifts) & (2**bits - 1)).float()


@cache
def _e2m1_of_byte() -> Tensor:
    values = torch.tensor((*E2M1, *(-value for value in E2M1)))
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1)
