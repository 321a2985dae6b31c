"""The formats that need no schemes of their own, one reader each: gpt-oss's MXFP4, GPTQ, AutoRound, AWQ, bitsandbytes.

MXFP4 experts as gpt-oss stores them: ``…_blocks (experts, rows, groups, 16)`` with ``…_scales (experts, rows,
groups)``. Each byte holds two e2m1 numbers, each scale is the exponent of a power of two for 32 of them. The weight is
what transformers has in memory, ``(experts, groups·32, rows)``: the transpose of what is stored.

GPTQ and AWQ: integers in 32-bit words, ``qweight`` with ``qzeros``, ``scales`` and the ``g_idx`` of GPTQ. Both store
the input dimension first; the weight is ``(out, in)``. The first GPTQ format stores each zero point less one (its
second, ``gptq_v2``, does not); symmetric data say which of the two they are. ``g_idx`` names the group of each input,
which activation order permutes. AutoRound packs as GPTQ without ``g_idx``, or as AWQ; ``extra_config`` has settings of
single modules, by name or by pattern.

bitsandbytes: 4-bit codes of a codebook (nf4, fp4) and 8-bit rows, as transformers saves them. The codebook, the scales
and the state (a JSON object in a tensor of bytes) lie in the checkpoint, so the library itself is not needed for
reading. 4 bits: ``weight`` (bytes in a column), ``weight.absmax``, ``weight.quant_map``,
``weight.quant_state.bitsandbytes__nf4``, and with double quantisation ``weight.nested_absmax``,
``weight.nested_quant_map``. 8 bits: ``weight`` (I8) and ``SCB``, the largest magnitude of each row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from moe_svd_distill.checkpoints.configuration import USE_PLAIN, matches, plain, whole_number
from moe_svd_distill.checkpoints.quantisation.coded import (
    WORD,
    Codebook,
    InputMajor,
    Part,
    Scaled,
    blocks,
)
from moe_svd_distill.checkpoints.quantisation.weights import Weights
from moe_svd_distill.checkpoints.quantisation.zero_points import refuse_unless_middle, settled_offset
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.header import TensorInfo
from moe_svd_distill.files.reading import json_object

MXFP4_GROUP = 32

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
GPTQ_BITS = (2, 3, 4, 8)
AUTO_ROUND = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}
PATTERN = re.compile(r"[^\w.-]")
WORD_SCALES = ("F16", "BF16", "F32")

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
LARGEST = 127.0
ROW_MAJOR = b"\0"


def read_mxfp4(weights: Weights, settings: Mapping[str, object]) -> None:
    """Claim every pair of blocks and scales."""
    for name, codes in weights.named("_blocks"):
        scale = weights.companion(codes, f"{name}_scales")
        if scale is None:
            continue
        if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[-1] != MXFP4_GROUP // 2:
            found = f"{codes.dtype} of shape {list(codes.shape)}"
            weights.fault(f"{shown(codes.name)} is {found} (expected U8 of shape [experts, rows, groups, 16])")
        elif scale.dtype not in ("U8", "F8_E8M0") or scale.shape != codes.shape[:-1]:
            weights.misfit(codes, scale, f"U8 {list(codes.shape[:-1])}")
        else:
            experts, rows, groups, _ = codes.shape
            coding = Scaled("e2m1", (1, 1, MXFP4_GROUP), exponents=True, transposed=True)
            label = f"mxfp4 in groups of {MXFP4_GROUP}"
            weights.claim(name, (experts, groups * MXFP4_GROUP, rows), coding, {"codes": codes, "scale": scale}, label)


def read_gptq(weights: Weights, settings: Mapping[str, object]) -> None:
    """Claim every ``qweight``. With ``g_idx`` its bits follow from the shapes, as a model may mix them.

    Raises:
        BadDataError: A packing that is not known.
    """
    written = settings.get("checkpoint_format") or "gptq"
    if written not in ZERO_OFFSETS:
        what = f"config.json has the GPTQ checkpoint_format {plain(written)} (expected {' or '.join(ZERO_OFFSETS)})"
        raise BadDataError(what, USE_PLAIN)
    found: dict[str, InputMajor] = {}
    zeros: list[tuple[TensorInfo, int, int]] = []
    for module, codes in weights.named(".qweight"):
        if not _is_words(weights, codes):
            continue
        own = _own_settings(module, settings)
        bits, group = whole_number(own, "bits", 4), whole_number(own, "group_size", 128)
        index = weights.stored.get(f"{module}.g_idx")
        inputs = codes.shape[0] * WORD // bits if index is None or len(index.shape) != 1 else index.shape[0]
        own_bits = codes.shape[0] * WORD // max(1, inputs)
        if own_bits not in GPTQ_BITS or own_bits * inputs != codes.shape[0] * WORD:
            weights.misfit(codes, index or codes, f"{' or '.join(map(str, GPTQ_BITS))} bits for each input")
            continue
        if index is not None and (index.dtype not in ("I32", "I64") or len(index.shape) != 1):
            weights.misfit(codes, index, f"I32 [{inputs}]")
            continue
        found[module] = InputMajor("gptq", own_bits, group if group > 0 else inputs, ZERO_OFFSETS[written])
        zero = weights.stored.get(f"{module}.qzeros")
        if zero is not None and _is_words(weights, zero) and own.get("sym") == settings.get("sym"):
            zeros.append((zero, own_bits, codes.shape[1]))
    offset = settled_offset(weights, zeros, ZERO_OFFSETS[written], symmetric=settings.get("sym") is True)
    note = "" if offset == ZERO_OFFSETS[written] else f", zero points not of {written} as config.json says"
    for module, coding in found.items():
        codes = weights.stored[f"{module}.qweight"]
        inputs = codes.shape[0] * WORD // coding.bits
        _claim_words(weights, module, (codes.shape[1], inputs), replace(coding, zero_offset=offset), note)


def read_auto_round(weights: Weights, settings: Mapping[str, object]) -> None:
    """Claim every ``qweight``, packed as GPTQ or AWQ.

    Raises:
        BadDataError: A packing that is not known, or numbers that are no integers.
    """
    packing, kind = settings.get("packing_format") or "auto_round:gptq", settings.get("data_type") or "int"
    if not isinstance(packing, str) or packing not in AUTO_ROUND or kind != "int":
        what = f"config.json has AutoRound's packing_format {plain(packing)} of data_type {plain(kind)}"
        raise BadDataError(f"{what} (expected int in {', '.join(AUTO_ROUND)})", USE_PLAIN)
    if AUTO_ROUND[packing] == "awq":
        read_awq(weights, {**settings, "version": "gemm"})
    else:
        read_gptq(weights, {**settings, "checkpoint_format": AUTO_ROUND[packing]})


def _own_settings(module: str, settings: Mapping[str, object]) -> Mapping[str, object]:
    """The settings of a module: what AutoRound says of it alone before what it says of all."""
    extra = settings.get("extra_config")
    if not isinstance(extra, dict):
        return settings
    own = extra.get(module)
    if own is None:
        patterns = (key for key in extra if PATTERN.search(key))
        own = next((extra[key] for key in patterns if matches(key, module)), None)
    return {**settings, **own} if isinstance(own, dict) else settings


def read_awq(weights: Weights, settings: Mapping[str, object]) -> None:
    """Claim every ``qweight``.

    Raises:
        BadDataError: A packing that is not known.
    """
    version, bits = str(settings.get("version") or "gemm").lower(), whole_number(settings, "bits", 4)
    if version != "gemm" or bits != 4:
        what = f"config.json has AWQ version {plain(version)} of {bits} bits (expected gemm of 4 bits)"
        raise BadDataError(what, USE_PLAIN)
    group = whole_number(settings, "group_size", 128)
    for module, codes in weights.named(".qweight"):
        if not _is_words(weights, codes):
            continue
        inputs, words = codes.shape
        coding = InputMajor("awq", bits, group if group > 0 else inputs, 0)
        symmetric = settings.get("zero_point") is False
        zero = weights.stored.get(f"{module}.qzeros")
        if symmetric and zero is not None:
            refuse_unless_middle(weights, zero, bits, words * WORD // bits, "zero_point: false")
        _claim_words(weights, module, (words * WORD // bits, inputs), coding, symmetric=symmetric)


def _is_words(weights: Weights, codes: TensorInfo) -> bool:
    if codes.dtype == "I32" and len(codes.shape) == 2:
        return True
    found = f"{codes.dtype} of shape {list(codes.shape)}"
    weights.fault(f"{shown(codes.name)} is {found} (expected I32 with 2 dimensions)")
    return False


def _claim_words(
    weights: Weights,
    module: str,
    shape: tuple[int, int],
    coding: InputMajor,
    note: str = "",
    *,
    symmetric: bool = False,
) -> None:
    codes, outputs, inputs = weights.stored[f"{module}.qweight"], *shape
    zero, index = (weights.stored.get(f"{module}.{name}") for name in ("qzeros", "g_idx"))
    scale = weights.companion(codes, f"{module}.scales")
    if scale is None or not (symmetric or zero or weights.companion(codes, f"{module}.qzeros")):
        return
    groups = blocks(inputs, coding.group)
    if scale.shape != (groups, outputs) or scale.dtype not in WORD_SCALES:
        weights.misfit(codes, scale, f"F16 {[groups, outputs]}")
        return
    words = blocks(outputs * coding.bits, WORD)
    if zero is not None and (zero.shape != (groups, words) or zero.dtype != "I32"):
        weights.misfit(codes, zero, f"I32 {[groups, words]}")
        return
    parts: dict[Part, TensorInfo] = {"codes": codes, "scale": scale}
    if zero is not None:
        parts["zero"] = zero
    if index is not None and coding.packing == "gptq":
        parts["column_group"] = index
    weights.claim(f"{module}.weight", shape, coding, parts, f"int{coding.bits} in groups of {coding.group}{note}")


def read_bitsandbytes(weights: Weights, settings: Mapping[str, object]) -> None:
    """Claim the 8-bit and the 4-bit weights."""
    for module, scale in weights.named(".SCB"):
        _claim_rows(weights, module, scale)
    for kind in KINDS:
        for name, state in weights.named(STATE + kind):
            try:
                _claim_codebook(weights, name, state, kind)
            except BadDataError as fault:
                weights.faults.append(fault)


def _claim_rows(weights: Weights, module: str, scale: TensorInfo) -> None:
    name = f"{module}.weight"
    codes, layout = weights.stored.get(name), weights.stored.get(f"{module}.weight_format")
    if codes is None or codes.dtype != "I8" or len(codes.shape) != 2:
        weights.fault(f"{shown(scale.name)} has no {shown(name)} of dtype I8 and 2 dimensions beside it")
    elif scale.dtype != "F32" or scale.shape != codes.shape[:1]:
        weights.misfit(codes, scale, f"F32 [{codes.shape[0]}]")
    elif layout is not None and weights.read_bytes(layout, layout.bytes) not in (None, ROW_MAJOR):
        weights.fault(f"{shown(name)} is not stored row by row", "Save the model again with a current bitsandbytes")
    else:
        unused = {} if layout is None else {layout.name: layout}
        coding = Scaled("element", (1, codes.shape[1]), divisor=LARGEST)
        weights.claim(name, codes.shape, coding, {"codes": codes, "scale": scale}, "int8 per channel", unused)


def _claim_codebook(weights: Weights, name: str, state: TensorInfo, kind: str) -> None:
    raw = weights.read_bytes(state, state.bytes)
    if raw is None:
        what = f"{shown(state.name)} says the shape of a weight, and is not at hand with the headers alone"
        weights.fault(what, "Download the model and give its folder")
        return
    fields = json_object(raw, shown(state.name), unique_keys=True)
    shape = fields.get("shape")
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise BadDataError(f"{shown(state.name)} has the shape {shown(shape)}", "Save the model again")
    nested = "nested_blocksize" in fields
    offset = fields.get("nested_offset", math.nan if nested else 0.0)
    coding = Codebook(
        whole_number(fields, "blocksize", 64),
        whole_number(fields, "nested_blocksize", 0),
        float(offset) if isinstance(offset, (int, float)) else math.nan,
    )
    if (
        coding.block < 2
        or coding.block % 2
        or (nested and coding.nested_block < 1)
        or not math.isfinite(coding.nested_offset)
    ):
        raise BadDataError(f"{shown(state.name)} has no usable block sizes and offset", "Save the model again")
    parts = _parts(weights, name, math.prod(shape), coding, nested)
    if parts is not None:
        label = f"{kind} in groups of {coding.block}" + (", nested" if nested else "")
        weights.claim(name, tuple(shape), coding, parts, label, {state.name: state})


def _parts(weights: Weights, name: str, count: int, coding: Codebook, nested: bool) -> dict[Part, TensorInfo] | None:
    """The companions, each of the dtype and number of elements that it must have."""
    scales = blocks(count, coding.block)
    wanted: dict[Part, tuple[str, str, int]] = {
        "codes": ("", "U8", blocks(count, 2)),
        "absmax": (".absmax", "U8" if nested else "F32", scales),
        "map": (".quant_map", "F32", 16),
    }
    if nested:
        wanted["nested_absmax"] = (".nested_absmax", "F32", blocks(scales, coding.nested_block))
        wanted["nested_map"] = (".nested_quant_map", "F32", 256)
    parts: dict[Part, TensorInfo] = {}
    for part, (suffix, dtype, elements) in wanted.items():
        info = weights.stored.get(name + suffix)
        if info is None or info.dtype != dtype or math.prod(info.shape) != elements:
            found = "nothing" if info is None else f"{info.dtype} of shape {list(info.shape)}"
            weights.fault(f"{shown(name + suffix)} should be {elements} elements of {dtype}, found {found}")
            return None
        parts[part] = info
    return parts
