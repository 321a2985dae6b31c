"""What ``config.json`` says about the quantisation of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.dtypes import TORCH_NAMES

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "awq", "gptq", "bitsandbytes")
PLAIN_WORD = re.compile(r"[\w.-]{1,40}")
USE_PLAIN = "Give the bf16 checkpoint"
DTYPES = {TORCH_NAMES[code]: code for code in ("F32", "F16", "BF16")}


@dataclass(frozen=True)
class Declared:
    """The method and its settings, as they are in ``config.json``."""

    method: str
    settings: Mapping[str, Any]


def declared_quantisation(config: Mapping[str, Any], source: str) -> Declared | None:
    """The quantisation that the configuration, or one nested in it, declares.

    Raises:
        BadDataError: A method that is not known, or two that contradict each other.
    """
    found: list[tuple[str, Any]] = []
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found += [(key, part[key]) for key in CONFIG_KEYS if part.get(key)]
    if not found:
        return None
    key, value = found[0]
    method = _method(key, value)
    if not isinstance(value, dict) or method not in METHODS:
        hint = " (MLX)" if key == "quantization" else ""
        what = f"{source}: {key} quant_method={plain(method)}{hint} is not a quantisation that is read here"
        raise BadDataError(f"{what} (read are {', '.join(METHODS)})", USE_PLAIN)
    if any(other != value for _, other in found[1:]):
        names = " and ".join(dict.fromkeys(name for name, _ in found))
        raise BadDataError(f"{source}: config.json declares two different quantisations ({names})", USE_PLAIN)
    return Declared(str(method), value)


def _method(key: str, value: Any) -> object:
    if not isinstance(value, dict):
        return value
    method = value.get("quant_method")
    if method is None and "config_groups" in value and key != "quantization":
        return "compressed-tensors"  # as llm-compressor wrote it in its first versions
    if method is None and ("load_in_4bit" in value or "load_in_8bit" in value):
        return "bitsandbytes"
    return value.get("format") if method is None else method


def plain(value: object) -> str:
    """The usual short word as it is; anything else escaped."""
    return value if isinstance(value, str) and PLAIN_WORD.fullmatch(value) else shown(value)


def model_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that the model computes in: BF16 unless the configuration names another."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            named = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
            if named in DTYPES:
                return DTYPES[named]
    return "BF16"


def whole_number(settings: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number of the settings.

    Raises:
        BadDataError: It is something else.
    """
    value = settings.get(key)
    if value is None:
        return default
    if type(value) is not int:
        raise BadDataError(f"config.json has the quantisation's {key} as {shown(value)} (expected a number)", USE_PLAIN)
    return value
