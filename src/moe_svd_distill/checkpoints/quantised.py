"""Refusing quantised checkpoints: their raw codes would be read as weights."""

from __future__ import annotations

import re
from typing import Any

from moe_svd_distill.checkpoints.checkpoint import Checkpoint
from moe_svd_distill.checkpoints.faults import shown
from moe_svd_distill.errors import BadDataError

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
PLAIN_WORD = re.compile(r"[\w.-]{1,40}")
CODE_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "U32"})
CODE_SUFFIXES = (
    ".weight_scale_inv",
    ".weight_packed",
    ".weight_scale",
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".SCB",
    ".absmax",
    ".quant_map",
)


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise if the configuration, a dtype or a tensor's name says that the weights are codes and not numbers."""
    refuse_quantised_config(checkpoint.config, checkpoint.source)
    for info in checkpoint.values():
        if info.dtype in CODE_DTYPES or info.name.endswith(CODE_SUFFIXES):
            found = f"tensor {shown(info.name)} of dtype {info.dtype} in {shown(info.file.name)}"
            raise _refusal(checkpoint.source, found)


def refuse_quantised_config(config: dict[str, Any], source: str) -> None:
    """The same from the configuration alone: before anything large is downloaded."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in CONFIG_KEYS:
            value = part.get(key)
            if value:
                method = value.get("quant_method", value.get("format")) if isinstance(value, dict) else value
                raise _refusal(source, f"{key} quant_method={_plain(method)}")


def _plain(method: object) -> str:
    """The usual short word as it is; anything else escaped."""
    return method if isinstance(method, str) and PLAIN_WORD.fullmatch(method) else shown(method)


def _refusal(source: str, found: str) -> BadDataError:
    return BadDataError(f"{source}: quantised checkpoints are not read yet, found {found}", "Give the bf16 checkpoint")
