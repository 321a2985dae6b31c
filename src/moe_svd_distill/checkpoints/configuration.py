"""A model's ``config.json``, and what modelopt says of the quantisation in a file beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_svd_distill.checkpoints.quantisation.claims import USE_PLAIN
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.reading import json_object, locate, read_small

CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"
QUANTISATION = "quantization_config"


def configuration_files(folder: Path) -> list[str]:
    """The files that say what the tensors mean."""
    return [CONFIG, *([MODELOPT] if os.path.lexists(folder / MODELOPT) else [])]


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``, completed; code that it names (``auto_map``) is never run.

    Raises:
        BadDataError: The two files name different quantisations, or are not what their names say.
    """
    config, *beside = (
        json_object(read_small(locate(folder, name)), shown(folder / name), unique_keys=False)
        for name in configuration_files(folder)
    )
    return _with_modelopt(config, beside[0], shown(folder / MODELOPT)) if beside else config


def _with_modelopt(config: dict[str, Any], written: Mapping[str, Any], source: str) -> dict[str, Any]:
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
