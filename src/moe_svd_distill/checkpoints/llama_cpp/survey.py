"""A GGUF model as a checkpoint: its configuration, its weights under the hub's names, and what is wrong with it."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_svd_distill.checkpoints.llama_cpp.config import config_of
from moe_svd_distill.checkpoints.llama_cpp.header import ANOTHER, Settings, Value, headers_of, package_fault
from moe_svd_distill.checkpoints.llama_cpp.weights import is_known, read_weights
from moe_svd_distill.checkpoints.quantisation.weights import Weights
from moe_svd_distill.checkpoints.survey import Survey, merge_headers
from moe_svd_distill.errors import BadDataError, DistillError, shown
from moe_svd_distill.files.header import TensorInfo
from moe_svd_distill.files.reading import opened, read_at

ORIGINS = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.source.url",
    "general.repo_url",
    "general.base_model.0.repo_url",
)
"""Where a file says which checkpoint it was made from; what it was made from comes before what that was tuned from."""

_HUB = re.compile(r"(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:/tree/\w+)?/?")
_UNREAD = "a setting of llama.cpp that no field of the configuration is made of"
_CHANGING = re.compile(r"scale|factor|softcap|clamp|alibi|temperature|causal")
_FACTORS = "rope_freqs.weight"
_MOST_FACTORS = 4096
_ROWS = 64
_ROUNDING = 0.4
"""Two roundings of one table differ by less, even to two bits; two tables by more than one."""


def survey_gguf(first: Path, source: str) -> Survey:
    """Read every header, from the first file on; gather the faults instead of stopping at the first."""
    result = Survey()
    if fault := package_fault(f"{source} is a GGUF file"):
        result.faults.append(fault)
        return result
    metadata: Mapping[str, Value] = {}
    for found in headers_of(first):
        if isinstance(found, DistillError):
            result.faults.append(found)
            continue
        metadata = metadata or found.metadata
        result.headers[found.file.name] = found
    stored, faults = merge_headers(result.headers)
    result.faults += faults
    result.weights = Weights.as_stored(stored)
    if result.faults:
        return result
    try:
        result.config, unread = _config(source, metadata, stored)
        result.origin = origin_of(metadata)
        result.weights = read_weights(stored, result.config)
        result.weights.set_aside |= unread
        result.faults += result.weights.faults
    except DistillError as fault:
        result.faults.append(fault)
    return result


def _config(
    source: str, metadata: Mapping[str, Value], stored: Mapping[str, TensorInfo]
) -> tuple[dict[str, object], dict[str, str]]:
    """The configuration, and the settings that nothing was made of."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise BadDataError(f"{source} is of general.type {shown(kind)} (expected model)", "Give the model's file")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise BadDataError(f"{source} does not say its general.architecture", "Give the first file of the model")
    settings = Settings(source, architecture, metadata, stored, _one_table(stored))
    config = config_of(settings, _factors(stored.get(_FACTORS)))
    unread = settings.unused()
    if changing := next((key for key in unread if _CHANGING.search(key)), None):
        what = f"{source} has the setting {changing} = {metadata[changing]}, which changes what {architecture} computes"
        raise BadDataError(f"{what} and is not read here", ANOTHER)
    return config, dict.fromkeys(unread, _UNREAD)


def _factors(info: TensorInfo | None) -> tuple[float, ...] | None:
    """The numbers of a small tensor of single precision."""
    if info is None:
        return None
    if info.dtype != "F32" or info.bytes > 4 * _MOST_FACTORS:
        what = f"{shown(info.name)} is {info.dtype} {list(info.shape)}"
        raise BadDataError(f"{what} (expected at most {_MOST_FACTORS} F32)", "Fetch the model again")
    with opened(info.file) as descriptor:
        raw = read_at(descriptor, info.file, info.offset, info.bytes)
    return struct.unpack(f"<{info.bytes // 4}f", raw)


def _one_table(stored: Mapping[str, TensorInfo]) -> bool:
    """Whether a file has embeddings and head apart that are one in the model: some converters write both."""
    tables = [stored.get(name) for name in ("token_embd.weight", "output.weight")]
    matrices = [info for info in tables if info is not None and len(info.shape) == 2 and is_known(info.dtype)]
    if len(matrices) < len(tables):
        return False
    first, second = map(_first_rows, matrices)
    return first.shape == second.shape and bool(abs(first - second).sum() < _ROUNDING * abs(second).sum())


def _first_rows(info: TensorInfo) -> Any:
    """Some rows of a matrix, (rows, columns) in float32."""
    import gguf
    import numpy as np

    rows = min(_ROWS, info.shape[0])
    with opened(info.file) as descriptor:
        raw = read_at(descriptor, info.file, info.offset, info.bytes // info.shape[0] * rows)
    stored = np.frombuffer(raw, np.uint8).reshape(rows, -1)
    with np.errstate(all="ignore"):
        return gguf.dequantize(stored, gguf.GGMLQuantizationType[info.dtype])


def origin_of(metadata: Mapping[str, Value]) -> tuple[str, str] | None:
    """The hub checkpoint that a file names as what it was made from, and the key it says so by."""
    for key in ORIGINS:
        value = metadata.get(key)
        if isinstance(value, str) and (match := _HUB.fullmatch(value)):
            return match[1], key
    return None
