"""bitsandbytes: 4-bit codes of a codebook (nf4, fp4) and 8-bit rows, as transformers saves them.

The codebook, the scales and the state (a JSON object in a tensor of bytes) lie in the checkpoint, so the library itself
is not needed for reading. 4 bits: ``weight`` (bytes in a column), ``weight.absmax``, ``weight.quant_map``,
``weight.quant_state.bitsandbytes__nf4``, and with double quantisation ``weight.nested_absmax``,
``weight.nested_quant_map``. 8 bits: ``weight`` (I8) and ``SCB``, the largest magnitude of each row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe_svd_distill.checkpoints.quantisation.claims import Claims
from moe_svd_distill.checkpoints.quantisation.coded import Codebook, Part, Scaled, blocks
from moe_svd_distill.checkpoints.quantisation.declared import whole_number
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.header import TensorInfo
from moe_svd_distill.files.reading import json_object

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
LARGEST = 127.0
ROW_MAJOR = b"\0"


def read_bitsandbytes(claims: Claims, settings: Mapping[str, Any]) -> None:
    """Claim the 8-bit and the 4-bit weights."""
    for module, scale in claims.named(".SCB"):
        _claim_rows(claims, module, scale)
    for kind in KINDS:
        for name, state in claims.named(STATE + kind):
            try:
                _claim_codebook(claims, name, state, kind)
            except BadDataError as fault:
                claims.faults.append(fault)


def _claim_rows(claims: Claims, module: str, scale: TensorInfo) -> None:
    name = f"{module}.weight"
    codes, layout = claims.stored.get(name), claims.stored.get(f"{module}.weight_format")
    if codes is None or codes.dtype != "I8" or len(codes.shape) != 2:
        claims.fault(f"{shown(scale.name)} has no {shown(name)} of dtype I8 and 2 dimensions beside it")
    elif scale.dtype != "F32" or scale.shape != codes.shape[:1]:
        claims.misfit(codes, scale, f"F32 [{codes.shape[0]}]")
    elif layout is not None and claims.read_bytes(layout) not in (None, ROW_MAJOR):
        claims.fault(f"{shown(name)} is not stored row by row", "Save the model again with a current bitsandbytes")
    else:
        unused = {} if layout is None else {layout.name: layout}
        coding = Scaled("element", (1, codes.shape[1]), divisor=LARGEST)
        claims.claim(name, codes.shape, coding, {"codes": codes, "scale": scale}, "int8 per channel", unused)


def _claim_codebook(claims: Claims, name: str, state: TensorInfo, kind: str) -> None:
    raw = claims.read_bytes(state)
    if raw is None:
        what = f"{shown(state.name)} says the shape of a weight, and is not at hand with the headers alone"
        claims.fault(what, "Download the model and give its folder")
        return
    fields = json_object(raw, shown(state.name), unique_keys=True)
    shape = fields.get("shape")
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise BadDataError(f"{shown(state.name)} has the shape {shown(shape)}", "Save the model again")
    nested = "nested_blocksize" in fields
    offset = fields.get("nested_offset", 0.0)
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
    parts = _parts(claims, name, math.prod(shape), coding, nested)
    if parts is not None:
        label = f"{kind} in groups of {coding.block}" + (", nested" if nested else "")
        claims.claim(name, tuple(shape), coding, parts, label, {state.name: state})


def _parts(claims: Claims, name: str, count: int, coding: Codebook, nested: bool) -> dict[Part, TensorInfo] | None:
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
        info = claims.stored.get(name + suffix)
        if info is None or info.dtype != dtype or math.prod(info.shape) != elements:
            found = "nothing" if info is None else f"{info.dtype} of shape {list(info.shape)}"
            claims.fault(f"{shown(name + suffix)} should be {elements} elements of {dtype}, found {found}")
            return None
        parts[part] = info
    return parts
