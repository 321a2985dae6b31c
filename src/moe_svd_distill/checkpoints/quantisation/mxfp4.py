"""MXFP4 experts as gpt-oss stores them: ``…_blocks (experts, rows, groups, 16)`` with ``…_scales (experts, rows,
groups)``.

Each byte holds two e2m1 numbers, each scale is the exponent of a power of two for 32 of them. The weight is what
transformers has in memory, ``(experts, groups·32, rows)``: the transpose of what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_svd_distill.checkpoints.quantisation.claims import Claims
from moe_svd_distill.checkpoints.quantisation.coded import Scaled
from moe_svd_distill.errors import shown

GROUP = 32


def read_mxfp4(claims: Claims, settings: Mapping[str, Any]) -> None:
    """Claim every pair of blocks and scales."""
    for name, codes in claims.named("_blocks"):
        scale = claims.stored.get(f"{name}_scales")
        if scale is None:
            claims.fault(f"{shown(codes.name)} has no {shown(name + '_scales')} beside it")
        elif codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[-1] != GROUP // 2:
            found = f"{codes.dtype} of shape {list(codes.shape)}"
            claims.fault(f"{shown(codes.name)} is {found} (expected U8 of shape [experts, rows, groups, 16])")
        elif scale.dtype not in ("U8", "F8_E8M0") or scale.shape != codes.shape[:-1]:
            claims.misfit(codes, scale, f"U8 {list(codes.shape[:-1])}")
        else:
            experts, rows, groups, _ = codes.shape
            coding = Scaled("e2m1", (1, 1, GROUP), exponents=True, transposed=True)
            label = f"mxfp4 in groups of {GROUP}"
            claims.claim(name, (experts, groups * GROUP, rows), coding, {"codes": codes, "scale": scale}, label)
