"""FP8 weights with scales in blocks, per row or per tensor: ``quant_method`` fp8 and fbgemm_fp8.

DeepSeek-V3, Qwen3-FP8 and others store ``weight`` (e4m3) with ``weight_scale_inv``, which despite its name is
multiplied. Fused experts of three dimensions have the suffix at the parameter's own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_svd_distill.checkpoints.quantisation.claims import Claims
from moe_svd_distill.checkpoints.quantisation.coded import Scaled, fit_grid, grid_words
from moe_svd_distill.checkpoints.quantisation.declared import USE_PLAIN
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.header import TensorInfo

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
SCALES = ("_scale_inv", "_scale")
SCALE_DTYPES = frozenset({"F32", "F16", "BF16", "F8_E8M0"})


def read_float8(claims: Claims, settings: Mapping[str, Any]) -> None:
    """Claim every FP8 tensor with its scale."""
    declared = block_size(settings.get("weight_block_size"))
    for info in claims.stored.values():
        if info.dtype not in FLOAT8:
            continue
        scales = [claims.stored[name] for suffix in SCALES if (name := info.name + suffix) in claims.stored]
        if len(scales) != 1:
            found = " and ".join(shown(scale.name) for scale in scales) or "none"
            claims.fault(f"{shown(info.name)} is {info.dtype} and needs one scale beside it, found {found}")
            continue
        _claim(claims, info, scales[0], declared)


def block_size(value: object) -> tuple[int, int] | None:
    """The size of a block, from a pair of numbers.

    Raises:
        BadDataError: It is something else.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    raise BadDataError(f"config.json has the block size {shown(value)} (expected two numbers above 0)", USE_PLAIN)


def _claim(claims: Claims, info: TensorInfo, scale: TensorInfo, declared: tuple[int, int] | None) -> None:
    if len(info.shape) not in (2, 3):
        claims.fault(f"{shown(info.name)} is {info.dtype} of shape {list(info.shape)} (expected 2 or 3 dimensions)")
        return
    block = fit_grid(info.shape, scale.shape, declared)
    if block is None or scale.dtype not in SCALE_DTYPES:
        expected = f"a scale per tensor, per row, or per block of {'×'.join(map(str, declared or ()))}"
        if declared is None:
            expected = "a scale per tensor or per row, as config.json has no weight_block_size"
        claims.misfit(info, scale, expected)
        return
    module = info.name.removesuffix("weight") if info.name.endswith(".weight") else f"{info.name}_"
    label = f"float8 {grid_words(block, info.shape)}"
    unused = claims.activations(module)
    claims.claim(info.name, info.shape, Scaled("element", block), {"codes": info, "scale": scale}, label, unused)
