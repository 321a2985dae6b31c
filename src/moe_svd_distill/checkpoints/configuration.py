"""What a model's ``config.json`` says, above all of its quantisation; modelopt says that in a file beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.dtypes import TORCH_NAMES
from moe_svd_distill.files.reading import json_object, locate, read_small

CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"
QUANTISATION = "quantization_config"
CONFIG_KEYS = (QUANTISATION, "compression_config", "quantization")
METHODS = (
    *("fp8", "fbgemm_fp8", "mxfp8", "modelopt", "compressed-tensors", "mxfp4"),
    *("awq", "gptq", "auto-round", "bitsandbytes"),
)
BESIDE = ("expert_dtype",)
"""What a model says of its quantisation outside of it: DeepSeek-V4."""
PLAIN_WORD = re.compile(r"[\w.-]{1,40}")
USE_PLAIN = "Give the bf16 checkpoint"
DTYPES = {TORCH_NAMES[code]: code for code in ("F32", "F16", "BF16")}


def configuration_files(folder: Path) -> list[str]:
    """The files that say what the tensors mean."""
    return [CONFIG, *([MODELOPT] if os.path.lexists(folder / MODELOPT) else [])]


def read_config(folder: Path) -> dict[str, object]:
    """The model's ``config.json``, completed; code that it names (``auto_map``) is never run.

    Raises:
        BadDataError: The two files name different quantisations, or are not what their names say.
    """
    config, *beside = (
        json_object(read_small(locate(folder, name)), shown(folder / name), unique_keys=False)
        for name in configuration_files(folder)
    )
    return _with_modelopt(config, beside[0], shown(folder / MODELOPT)) if beside else config


def _with_modelopt(config: dict[str, object], written: Mapping[str, object], source: str) -> dict[str, object]:
    """FP8 models that modelopt quantised further keep the size of their blocks in ``config.json``."""
    own, added = config.get(QUANTISATION) or {}, written.get("quantization")
    if not isinstance(added, dict) or not isinstance(own, dict):
        raise BadDataError(f"{source} does not describe a quantisation", USE_PLAIN)
    algorithms = {shown(part["quant_algo"]) for part in (own, added) if part.get("quant_algo")}
    method = own.get("quant_method", "modelopt")
    if method not in ("fp8", "mxfp8", "modelopt") or len(algorithms) > 1:
        found = " and ".join(sorted(algorithms | {shown(method)}))
        raise BadDataError(f"{source} and config.json name two different quantisations ({found})", USE_PLAIN)
    return {**config, QUANTISATION: {**own, **added, "quant_method": "modelopt"}}


def declared_quantisation(config: Mapping[str, object], source: str) -> tuple[str, Mapping[str, object]] | None:
    """Method and settings of the quantisation that the configuration, or one nested in it, declares.

    Raises:
        BadDataError: A method that is not known, or two that contradict each other.
    """
    found: list[tuple[str, Any]] = []
    parts = (config, *(value for value in config.values() if isinstance(value, dict)))
    for part in parts:
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
    beside = {key: part[key] for part in parts for key in BESIDE if key in part}
    return str(method), {**beside, **value}


def _method(key: str, value: Any) -> object:
    if not isinstance(value, dict):
        return value
    method = value.get("quant_method")
    if method is None and "config_groups" in value and key != "quantization":
        return "compressed-tensors"  # as llm-compressor wrote it in its first versions
    if method is None and "quant_algo" in value:
        return "modelopt"
    if method is None and ("load_in_4bit" in value or "load_in_8bit" in value):
        return "bitsandbytes"
    return value.get("format") if method is None else method


def plain(value: object) -> str:
    """The usual short word as it is; anything else escaped."""
    return value if isinstance(value, str) and PLAIN_WORD.fullmatch(value) else shown(value)


def model_dtype(config: Mapping[str, object]) -> str:
    """The dtype that the model computes in: BF16 unless the configuration names another."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            named = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
            if named in DTYPES:
                return DTYPES[named]
    return "BF16"


def whole_number(settings: Mapping[str, object], key: str, default: int) -> int:
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


def listed(settings: Mapping[str, object], key: str) -> Sequence[object]:
    """What a list of the settings holds; nothing where there is none."""
    value = settings.get(key)
    return value if isinstance(value, list) else ()


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


def matches(pattern: str, name: str, *, anywhere: bool = True) -> bool:
    """Whether a pattern of the configuration fits a name, anywhere in it or from its beginning.

    Raises:
        BadDataError: It is not a pattern.
    """
    try:
        return (re.search if anywhere else re.match)(pattern, name) is not None
    except re.error as error:
        raise BadDataError(f"config.json has the pattern {shown(pattern)}: {error}", USE_PLAIN) from error
