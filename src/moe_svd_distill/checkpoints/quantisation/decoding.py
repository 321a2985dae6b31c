"""The numbers of a quantised weight, a slab of rows at a time.

All arithmetic is float32, rounded once to the weight's dtype. Beside the result and the stored bytes, which are views
on the file, only a slab is in memory. Packed codes become numbers by pure functions, which tests hold against
the libraries that wrote the formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import torch
from jaxtyping import Float32, Int32, Shaped, UInt8
from torch import Tensor

from moe_svd_distill.checkpoints.quantisation.coded import WORD, Codebook, Coded, Ggml, InputMajor, Part, Scaled, align
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.dtypes import torch_dtype
from moe_svd_distill.files.reading import FETCH_AGAIN

SLAB_ELEMENTS = 1 << 18
AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ each of its eight columns lies."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float; bit 3 is the sign. OCP Microscaling Formats 1.0, table 5."""

Parts = Mapping[Part, Tensor]


def dequantise(coded: Coded, parts: Parts, rows: slice, device: str | torch.device) -> Tensor:
    """Rows of a weight, in its dtype, on a device; the codes (but llama.cpp's) go there and become numbers there.

    Raises:
        BadDataError: An index among the parts points outside.
    """
    coding = coded.coding
    begin, end, _ = rows.indices(coded.info.shape[0])
    dtype = torch_dtype(coded.info.dtype)
    out = torch.empty((max(0, end - begin), *coded.info.shape[1:]), dtype=dtype, device=device)
    if out.is_meta or not out.numel():
        return out
    if isinstance(coding, Ggml):
        from moe_svd_distill.checkpoints.llama_cpp.numbers import decode_ggml

        decode_ggml(coding, parts, out, begin, coded)
        return out
    parts = {part: tensor.to(device) for part, tensor in parts.items()}
    if isinstance(coding, Codebook):
        _decode_codebook(coding, parts, out, begin)
    elif isinstance(coding, InputMajor):
        _decode_input_major(coding, parts, out, begin, coded)
    else:
        _decode_scaled(coding, parts, out, begin, coded)
    return out


def _slabs(begin: int, end: int, width: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows of bounded size; all but the last begin and end at multiples of ``step``."""
    size = max(step, SLAB_ELEMENTS // max(1, width) // step * step)
    while begin < end:
        stop = min(end, begin - begin % step + size)
        yield begin, stop
        begin = stop


def _decode_scaled(coding: Scaled, parts: Parts, out: Tensor, begin: int, coded: Coded) -> None:
    grids = _grids(coding, parts, coded)
    if len(coded.info.shape) == 2:
        _fill(coding, {**parts, **grids}, out, begin, coded)
        return
    for place in range(out.shape[0]):
        target = out[place].T if coding.transposed else out[place]
        _fill(coding, _of_matrix(parts, grids, begin + place), target, 0, coded)


def dequantise_matrix(coded: Coded, coding: Scaled, parts: Parts, matrix: int, rows: slice) -> Tensor:
    """Rows of one matrix of a weight with three dimensions, as they are stored: transposed where the weight is."""
    _, *sizes = coded.info.shape
    height, width = sizes[::-1] if coding.transposed else sizes
    begin, end, _ = rows.indices(height)
    dtype = torch_dtype(coded.info.dtype)
    out = torch.empty((max(0, end - begin), width), dtype=dtype)
    _fill(coding, _of_matrix(parts, _grids(coding, parts, coded), matrix), out, begin, coded)
    return out


def _grids(coding: Scaled, parts: Parts, coded: Coded) -> dict[Part, Tensor]:
    """Scales and zero points with as many dimensions as the codes."""
    shape = coded.info.shape
    stored = (*shape[:-2], shape[-1], shape[-2]) if coding.transposed else shape
    grids: dict[Part, Tensor] = {"scale": _aligned(parts["scale"], stored)}
    if "zero" in parts and not coding.zero_words:
        grids["zero"] = _aligned(parts["zero"], stored)
    if "second_scale" in parts:
        grids["second_scale"] = parts["second_scale"].view(-1)
    return grids


def _of_matrix(parts: Parts, grids: Parts, matrix: int) -> Parts:
    own: dict[Part, Tensor] = {part: grid[min(matrix, grid.shape[0] - 1)] for part, grid in grids.items()}
    return {**parts, **own, "codes": parts["codes"][matrix].flatten(1)}


def _aligned(grid: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The scales with as many dimensions as the weight."""
    return grid.view(align(shape, tuple(grid.shape)) or grid.shape)


def _fill(coding: Scaled, parts: Parts, out: Tensor, begin: int, coded: Coded) -> None:
    """One matrix: the parts are all of it, ``out`` its rows from ``begin`` on."""
    codes, scale, zero = parts["codes"], parts["scale"], parts.get("zero")
    columns, (rows_per_scale, columns_per_scale) = out.shape[1], coding.block[-2:]
    index = _column_group(parts, scale.shape[1], columns_per_scale, coded)
    for first, last in _slabs(begin, begin + out.shape[0], columns, WORD):
        values = _numbers(coding, codes[first:last], columns)
        factor = _of_rows(scale, first, last, rows_per_scale, exponents=coding.exponents) / coding.divisor
        if "second_scale" in parts:
            factor = factor * parts["second_scale"].view(-1)[0].float()
        if "global_scale" in parts:
            factor = factor / parts["global_scale"].view(-1)[0].float()
        shift = None
        if zero is not None and coding.zero_words:
            shift = _zeros_of_rows(zero, coding.bits, first, last) - 2 ** (coding.bits - 1)
        elif zero is not None:
            shift = _of_rows(zero, first, last, rows_per_scale)
        _scale_(values, factor, shift, columns_per_scale, index)
        out[first - begin : last - begin] = values


def _of_rows(grid: Tensor, first: int, last: int, rows_per_scale: int, *, exponents: bool = False) -> Tensor:
    """The scales of some rows, ``(rows, groups)`` in float32."""
    low = first // rows_per_scale
    needed = float32(grid[low : -(-last // rows_per_scale)], exponents=exponents)
    return needed[torch.arange(first, last, device=grid.device) // rows_per_scale - low]


def _numbers(coding: Scaled, codes: Tensor, columns: int) -> Tensor:
    if coding.codes == "words":
        return unpack_words(codes, coding.bits, columns).sub_(2 ** (coding.bits - 1))
    return unpack_e2m1(codes.view(torch.uint8)) if coding.codes == "e2m1" else codes.float()


def _zeros_of_rows(words: Tensor, bits: int, first: int, last: int) -> Tensor:
    """Zero points packed along the rows, ``(words, groups)``, of some rows: unsigned, ``(rows, groups)``."""
    start = first - first % WORD
    needed = words[start * bits // WORD : -(-last * bits // WORD)]
    return unpack_words(needed.T, bits, last - start)[:, first - start :].T


def _scale_(values: Tensor, scale: Tensor, zero: Tensor | None, width: int, index: Tensor | None) -> None:
    """``(values - zero) * scale`` in place: scales are ``(rows, groups)``, the last group may be ragged."""
    if index is not None:
        if zero is not None:
            values.sub_(zero[:, index])
        values.mul_(scale[:, index])
        return
    whole = values.shape[1] // width
    pieces = [(values[:, : whole * width].view(values.shape[0], whole, width), slice(0, whole))] if whole else []
    if whole * width < values.shape[1]:
        pieces.append((values[:, whole * width :].unsqueeze(1), slice(whole, whole + 1)))
    for piece, groups in pieces:
        if zero is not None:
            piece.sub_(zero[:, groups, None])
        piece.mul_(scale[:, groups, None])


def _decode_input_major(coding: InputMajor, parts: Parts, out: Tensor, begin: int, coded: Coded) -> None:
    codes, scale, zero, bits = parts["codes"], parts["scale"], parts.get("zero"), coding.bits
    inputs = out.shape[1]
    index = _column_group(parts, scale.shape[0], coding.group, coded)
    unpack = _awq_rows if coding.packing == "awq" else _gptq_rows
    for first, last in _slabs(begin, begin + out.shape[0], inputs, WORD):
        values = unpack(codes, bits, first, last, inputs)
        if zero is None:
            shift = torch.full((last - first, scale.shape[0]), 2.0 ** (bits - 1), device=out.device)
        else:
            awq = coding.packing == "awq"
            stored = _awq_rows(zero, bits, first, last, 0) if awq else _zeros_of_rows(zero.T, bits, first, last)
            shift = (stored + coding.zero_offset) % 2**bits
        _scale_(values, scale[:, first:last].T.float(), shift, coding.group, index)
        out[first - begin : last - begin] = values


def _gptq_rows(codes: Tensor, bits: int, first: int, last: int, inputs: int) -> Tensor:
    return unpack_words(codes[:, first:last].T, bits, inputs)


def _awq_rows(codes: Tensor, bits: int, first: int, last: int, inputs: int) -> Tensor:
    """Columns ``first`` to ``last`` of what is packed along the columns, transposed: ``(last - first, rows)``."""
    per_word = WORD // bits
    start = first - first % per_word
    needed = codes[:, start // per_word : -(-last // per_word)]
    values = unpack_words(needed, bits, needed.shape[1] * per_word).view(codes.shape[0], -1, per_word)
    return values[:, :, AWQ_COLUMNS].flatten(1)[:, first - start : last - start].T.contiguous()


def _column_group(parts: Parts, groups: int, width: int, coded: Coded) -> Tensor | None:
    """The group of each column, where an index says it and the columns are not simply in order."""
    index = parts.get("column_group")
    if index is None:
        return None
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
        name = coded.parts["column_group"].name
        found = f"{int(index.min())} to {int(index.max())}"
        raise BadDataError(f"{shown(name)} names the groups {found} (expected 0 to {groups - 1})", FETCH_AGAIN)
    index = index.long()
    return None if torch.equal(index, torch.arange(index.numel(), device=index.device) // width) else index


def _decode_codebook(coding: Codebook, parts: Parts, out: Tensor, begin: int) -> None:
    per_row = out[0].numel() if out.shape[0] else 0
    start, end = begin * per_row, (begin + out.shape[0]) * per_row
    table = pairs_high_first(parts["map"].view(-1).float())
    flat, codes, absmax = out.view(-1), parts["codes"].view(-1), parts["absmax"].view(-1)
    for first, last in _slabs(start, end, 1, coding.block):
        low = first // coding.block
        high = -(-last // coding.block)
        needed = codes[low * coding.block // 2 : -(-last // 2)]
        values = look_up(table, needed.view(1, -1)).view(-1)
        of_block = _absmax(coding, parts, absmax[low:high], low)
        which = torch.arange(values.numel(), device=out.device) // coding.block
        values = values * of_block[which]
        flat[first - start : last - start] = values[first - low * coding.block : last - low * coding.block]


def _absmax(coding: Codebook, parts: Parts, absmax: Tensor, first: int) -> Tensor:
    """The largest magnitudes of some blocks, float32."""
    if not coding.nested_block:
        return absmax.float()
    nested = parts["nested_absmax"].view(-1)
    which = torch.arange(first, first + absmax.numel(), device=absmax.device) // coding.nested_block
    return parts["nested_map"].view(-1)[absmax.int()] * nested[which] + coding.nested_offset


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
