"""A weight that is stored as codes with companions (scales, zero points, indices), described from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from moe_svd_distill.files.header import TensorInfo

Part = Literal[
    "codes",
    "scale",
    "second_scale",
    "global_scale",
    "zero",
    "column_group",
    "absmax",
    "map",
    "nested_absmax",
    "nested_map",
    "second",
]
Codes = Literal["element", "words", "e2m1"]
Arrangement = Literal["rows", "turned", "less_one", "transposed", "interleaved", "latent"]

WORD = 32
"""Bits of what codes of a few bits are packed in."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """``(code - zero) * scale``, stored row by row; one scale and zero for each block of elements.

    Attributes:
        codes: ``element``: one number per element. ``words``: integers of ``bits`` bits in 32-bit words along a row,
            shifted by ``2**(bits - 1)`` to be unsigned. ``e2m1``: two 4-bit floats per byte along a row, the first one
            in the low half.
        block: Elements that share a scale, along each dimension of the codes. A second scale
            multiplies, and a global scale divides, all of them.
        bits: Bits per code of ``words``.
        exponents: The scales are the biased exponents of powers of two (E8M0) in bytes.
        zero_words: The zero points are in words as the codes are, but along the columns.
        divisor: What the scale is divided by.
        transposed: The weight is the transpose of what is stored, in its last two dimensions.
    """

    codes: Codes
    block: tuple[int, ...]
    bits: int = 8
    exponents: bool = False
    zero_words: bool = False
    divisor: float = 1.0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class InputMajor:
    """``(code - zero) * scale`` as GPTQ and AWQ store it: ``scale (groups, out)``, the input dimension first.

    Attributes:
        packing: ``gptq``: words along the input dimension, ``(in·bits/32, out)``. ``awq``: words along the output
            dimension, ``(in, out·bits/32)``, in the order 0 2 4 6 1 3 5 7. Zero points lie along the output dimension.
        bits: Bits per code.
        group: Inputs that share a scale, where no index says which do.
        zero_offset: What the stored zero points lack, modulo ``2**bits``: 1 in the first GPTQ format.
    """

    packing: Literal["gptq", "awq"]
    bits: int
    group: int
    zero_offset: int


@dataclass(frozen=True, slots=True)
class Codebook:
    """``map[code] * absmax``, two 4-bit codes per byte of the flattened weight, the first one in the high half.

    Attributes:
        block: Elements that share an absmax.
        nested_block: Entries of absmax that share a nested absmax: ``absmax = nested_map[code] * nested_absmax +
            nested_offset``; 0 where absmax is stored plainly.
        nested_offset: See ``nested_block``.
    """

    block: int
    nested_block: int = 0
    nested_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Ggml:
    """Blocks of llama.cpp's types, which the package `gguf` turns into numbers; a part's dtype is its type.

    Attributes:
        arrangement: What the weight is of its parts. ``rows``: the codes as they are. ``turned``: rows of each head
            (2i, 2i+1) are rows (i, i + half) of the weight. ``less_one``: one is subtracted. ``transposed``: in the
            last two dimensions. ``interleaved``: codes and second part by turns along the last dimension, after
            transposing what has three dimensions. ``latent``: head by head, the transpose of the codes and then the
            second part.
        heads: Of ``turned``.
    """

    arrangement: Arrangement
    heads: int = 1


Coding = Scaled | InputMajor | Codebook | Ggml


@dataclass(frozen=True, slots=True)
class Coded:
    """One weight.

    Attributes:
        info: Name, shape and dtype of the dequantised weight; ``bytes`` is what it takes in the files, with all its
            companions, and ``offset`` is that of its codes.
        coding: How the numbers come out.
        parts: What is read for it.
        label: The coding in the field's words.
    """

    info: TensorInfo
    coding: Coding
    parts: Mapping[Part, TensorInfo]
    label: str


def blocks(length: int, block: int) -> int:
    """How many blocks cover a length; the last one may be ragged."""
    return -(-length // block)


@lru_cache(maxsize=1 << 12)
def fit_grid(
    shape: tuple[int, ...], scale: tuple[int, ...], declared: tuple[int, ...] | None = None
) -> tuple[int, ...] | None:
    """The block of elements that shares one scale, or ``None`` if the shapes do not fit together.

    A dimension of the scales is 1, or the weight's own, or the number of declared blocks. The size of a block is never
    concluded from the number of blocks: with a ragged last block that number does not say it (192 rows in two blocks
    are 128 + 64 rows, not 96 + 96).

    Args:
        shape: The weight's.
        scale: The scales'. One scale alone may have any dimensions, scales of rows may lack the last one.
        declared: The size of a block in the last dimensions, from the configuration.
    """
    aligned = align(shape, scale)
    if aligned is None:
        return None
    wanted = (1,) * (len(shape) - len(declared)) + declared if declared else None
    result = []
    for axis, (length, count) in enumerate(zip(shape, aligned, strict=True)):
        if wanted is not None and count == blocks(length, wanted[axis]):
            result.append(wanted[axis])
        elif count in (1, length):
            result.append(max(1, length // max(1, count)))
        else:
            return None
    return tuple(result)


def align(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the scales with as many dimensions as the weight's."""
    if all(count == 1 for count in scale):
        return (1,) * len(shape)
    if len(scale) == 2 * len(shape) and all(count == 1 for count in scale[1::2]):
        return scale[::2]  # each block's own numbers as further dimensions, as modelopt keeps them
    if len(scale) == len(shape):
        return scale
    if len(scale) < len(shape) and scale == shape[: len(scale)]:
        return scale + (1,) * (len(shape) - len(scale))
    return None


@lru_cache(maxsize=1 << 12)
def grid_words(block: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """A block in words: a scale per tensor, per channel, in groups of 128, in blocks of 128×128."""
    rows, columns = block[-2:]
    if rows >= shape[-2] and columns >= shape[-1]:
        return "per tensor"
    if rows == 1 and columns >= shape[-1]:
        return "per channel"
    return f"in groups of {columns}" if rows == 1 else f"in blocks of {rows}×{columns}"
