"""Rotary positions of a GGUF file, in the words of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_svd_distill.checkpoints.llama_cpp.header import ANOTHER, Settings
from moe_svd_distill.errors import BadDataError, shown

_LOW, _HIGH = 1.0, 4.0
_ORIGINALS = (8192, *(1 << power for power in range(10, 19)))
_SAME = 1e-3


def rotary_parameters(settings: Settings, dimensions: int, factors: Sequence[float] | None) -> dict[str, object]:
    """The `rope_parameters` of the configuration.

    Args:
        settings: The file's.
        dimensions: Of a head that are turned.
        factors: What each frequency is divided by, where the file has a tensor that says so.

    Raises:
        BadDataError: Something that transformers has no words for.
    """
    base = {"rope_theta": settings.find("rope.freq_base") or 10_000.0}
    turned = settings.find("rope.dimension_count")
    if turned is not None and turned != dimensions:
        raise BadDataError(
            f"{settings.source} turns {turned} dimensions of a head with {dimensions}, which is not read here", ANOTHER
        )
    kind = settings.find("rope.scaling.type") or "none"
    if factors is not None and any(abs(factor - 1) > _SAME for factor in factors):
        return base | _by_wavelength(settings, factors, base["rope_theta"])
    if kind == "none":
        return base | {"rope_type": "default"}
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": settings.need("rope.scaling.factor")}
    if kind != "yarn":
        raise BadDataError(
            f"{settings.source} scales rotary positions by {shown(kind)} (read are linear, yarn and Llama 3's)",
            ANOTHER,
        )
    return base | _yarn(settings)


def _yarn(settings: Settings) -> dict[str, object]:
    found = {
        "rope_type": "yarn",
        "factor": settings.need("rope.scaling.factor"),
        "original_max_position_embeddings": settings.need("rope.scaling.original_context_length"),
    }
    optional = {
        "attention_factor": "rope.scaling.yarn_attn_factor",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    found |= {name: value for name, key in optional.items() if (value := settings.find(key)) is not None}
    if (multiplier := settings.find("rope.scaling.yarn_log_multiplier")) is not None:
        # Of DeepSeek, a tenth of mscale_all_dim; mscale is not in the file, and the same in every model so far.
        found |= dict.fromkeys(("mscale", "mscale_all_dim"), round(multiplier * 10, 6))
    return found | ({"truncate": False} if settings.architecture == "gpt-oss" else {})


def _by_wavelength(settings: Settings, factors: Sequence[float], theta: float) -> dict[str, object]:
    """Llama 3's scaling, told by the factors that it makes; which context it was for shows in them."""
    factor = max(factors)
    lengths = [2 * math.pi * theta ** (place / len(factors)) for place in range(len(factors))]
    for original in _ORIGINALS:
        made = [_divisor(length, factor, original) for length in lengths]
        if all(math.isclose(found, wanted, rel_tol=_SAME) for found, wanted in zip(made, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    raise BadDataError(f"{settings.source} scales rotary positions otherwise than Llama 3 does (rope_freqs)", ANOTHER)


def _divisor(length: float, factor: float, original: int) -> float:
    """What the frequency of a wavelength is divided by."""
    if length < original / _HIGH:
        return 1.0
    if length > original / _LOW:
        return factor
    smooth = (original / length - _LOW) / (_HIGH - _LOW)
    return 1 / ((1 - smooth) / factor + smooth)
