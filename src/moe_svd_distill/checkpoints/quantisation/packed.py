"""GPTQ and AWQ: integers in 32-bit words, ``qweight`` with ``qzeros``, ``scales`` and the ``g_idx`` of GPTQ.

Both store the input dimension first; the weight is ``(out, in)``. The first GPTQ format stores each zero point less one
(its second, ``gptq_v2``, does not). ``g_idx`` names the group of each input, which activation order permutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_svd_distill.checkpoints.quantisation.claims import Claims
from moe_svd_distill.checkpoints.quantisation.coded import InputMajor, Part, blocks
from moe_svd_distill.checkpoints.quantisation.declared import USE_PLAIN, plain, whole_number
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.header import TensorInfo

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
GPTQ_BITS = (2, 3, 4, 8)
WORD = 32
SCALE_DTYPES = ("F16", "BF16", "F32")


def read_gptq(claims: Claims, settings: Mapping[str, Any]) -> None:
    """Claim every ``qweight``. With ``g_idx`` its bits follow from the shapes, as a model may mix them.

    Raises:
        BadDataError: A packing that is not known.
    """
    written = settings.get("checkpoint_format") or "gptq"
    if written not in ZERO_OFFSETS:
        what = f"config.json has the GPTQ checkpoint_format {plain(written)} (expected {' or '.join(ZERO_OFFSETS)})"
        raise BadDataError(what, USE_PLAIN)
    bits, group = whole_number(settings, "bits", 4), whole_number(settings, "group_size", 128)
    for module, codes in claims.named(".qweight"):
        if not _is_words(claims, codes):
            continue
        index = claims.stored.get(f"{module}.g_idx")
        inputs = codes.shape[0] * WORD // bits if index is None or len(index.shape) != 1 else index.shape[0]
        own_bits = codes.shape[0] * WORD // max(1, inputs)
        if own_bits not in GPTQ_BITS or own_bits * inputs != codes.shape[0] * WORD:
            claims.misfit(codes, index or codes, f"{' or '.join(map(str, GPTQ_BITS))} bits for each input")
            continue
        if index is not None and (index.dtype not in ("I32", "I64") or len(index.shape) != 1):
            claims.misfit(codes, index, f"I32 [{inputs}]")
            continue
        shape = (codes.shape[1], inputs)
        own_group = group if group > 0 else inputs
        _claim(claims, module, shape, InputMajor("gptq", own_bits, own_group, ZERO_OFFSETS[written]), codes, index)


def read_awq(claims: Claims, settings: Mapping[str, Any]) -> None:
    """Claim every ``qweight``.

    Raises:
        BadDataError: A packing that is not known.
    """
    version, bits = str(settings.get("version") or "gemm").lower(), whole_number(settings, "bits", 4)
    if version != "gemm" or bits != 4:
        what = f"config.json has AWQ version {plain(version)} of {bits} bits (expected gemm of 4 bits)"
        raise BadDataError(what, USE_PLAIN)
    group = whole_number(settings, "group_size", 128)
    for module, codes in claims.named(".qweight"):
        if not _is_words(claims, codes):
            continue
        inputs, words = codes.shape
        coding = InputMajor("awq", bits, group if group > 0 else inputs, 0)
        symmetric = settings.get("zero_point") is False
        _claim(claims, module, (words * WORD // bits, inputs), coding, codes, None, symmetric=symmetric)


def _is_words(claims: Claims, codes: TensorInfo) -> bool:
    if codes.dtype == "I32" and len(codes.shape) == 2:
        return True
    found = f"{codes.dtype} of shape {list(codes.shape)}"
    claims.fault(f"{shown(codes.name)} is {found} (expected I32 with 2 dimensions)")
    return False


def _claim(
    claims: Claims,
    module: str,
    shape: tuple[int, int],
    coding: InputMajor,
    codes: TensorInfo,
    index: TensorInfo | None,
    *,
    symmetric: bool = False,
) -> None:
    scale, zero = claims.stored.get(f"{module}.scales"), claims.stored.get(f"{module}.qzeros")
    outputs, inputs = shape
    if scale is None or (zero is None and not symmetric):
        claims.fault(
            f"{shown(codes.name)} has no {shown(module + ('.scales' if scale is None else '.qzeros'))} beside it"
        )
        return
    groups = blocks(inputs, coding.group)
    if scale.shape != (groups, outputs) or scale.dtype not in SCALE_DTYPES:
        claims.misfit(codes, scale, f"F16 {[groups, outputs]}")
        return
    words = blocks(outputs * coding.bits, WORD)
    if zero is not None and (zero.shape != (groups, words) or zero.dtype != "I32"):
        claims.misfit(codes, zero, f"I32 {[groups, words]}")
        return
    parts: dict[Part, TensorInfo] = {"codes": codes, "scale": scale}
    if zero is not None:
        parts["zero"] = zero
    if index is not None:
        parts["column_group"] = index
    label = f"int{coding.bits} in groups of {coding.group}"
    claims.claim(f"{module}.weight", shape, coding, parts, label)
