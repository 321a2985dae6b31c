"""From the stored tensors of a model to its weights: every stored tensor is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_svd_distill.checkpoints.quantisation.claims import (
    USE_PLAIN,
    Bytes,
    Claims,
    declared_quantisation,
    model_dtype,
)
from moe_svd_distill.checkpoints.quantisation.coded import Coded
from moe_svd_distill.checkpoints.quantisation.compressed import read_compressed
from moe_svd_distill.checkpoints.quantisation.formats import (
    read_auto_round,
    read_awq,
    read_bitsandbytes,
    read_gptq,
    read_mxfp4,
)
from moe_svd_distill.checkpoints.quantisation.scaled import read_float8, read_modelopt, read_mxfp8
from moe_svd_distill.errors import BadDataError, DistillError, shown
from moe_svd_distill.files.header import TensorInfo

READERS: dict[str, Callable[[Claims, Mapping[str, Any]], None]] = {
    "fp8": read_float8,
    "fbgemm_fp8": read_float8,
    "mxfp8": read_mxfp8,
    "modelopt": read_modelopt,
    "compressed-tensors": read_compressed,
    "mxfp4": read_mxfp4,
    "awq": read_awq,
    "gptq": read_gptq,
    "auto-round": read_auto_round,
    "bitsandbytes": read_bitsandbytes,
}
CODE_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "U32"})
CODE_SUFFIXES = (
    *(".weight_scale_inv", ".weight_packed", ".weight_scale", ".weight_global_scale", ".weight_zero_point"),
    *(".qweight", ".qzeros", ".g_idx", ".SCB", ".absmax", ".nested_absmax", ".quant_map", "_scale_inv"),
    *("_weight_scale", "_scale_2", ".qscale_weight", ".pre_quant_scale"),
)


@dataclass(frozen=True)
class View:
    """The weights of a model.

    Attributes:
        tensors: Name to shape and dtype of the weight; its ``bytes`` are those in the files, companions included.
        coded: Name to how the weight is stored, for those that are quantised.
        companions: Name of a stored tensor to that of the weight it belongs to.
        set_aside: Name of a stored tensor that belongs to no weight to the reason why none needs it.
        quantisation: Method and codings in words, or ``None`` for a plain model.
        notes: Where the configuration says something else than the tensors, which count.
    """

    tensors: Mapping[str, TensorInfo]
    coded: Mapping[str, Coded] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)
    set_aside: Mapping[str, str] = field(default_factory=dict)
    quantisation: str | None = None
    notes: tuple[str, ...] = ()


def view_of(
    stored: Mapping[str, TensorInfo], config: Mapping[str, Any], source: str, read_bytes: Bytes
) -> tuple[View, list[DistillError]]:
    """The weights that the stored tensors make up, and all that is wrong with them.

    Codes that nothing explains are a fault: they are never handed out as numbers.
    """
    claims = Claims(stored, model_dtype(config), read_bytes)
    try:
        method, settings = declared_quantisation(config, source) or (None, {})
        if method is not None:
            READERS[method](claims, settings)
            claims.set_cache_aside()
    except DistillError as fault:
        return View(stored), [fault, *claims.faults]
    if not claims.faults:
        claims.faults += _unexplained(claims, method, source)
    accounted = claims.companions.keys() | claims.set_aside.keys() | claims.coded.keys()
    tensors = {name: info for name, info in stored.items() if name not in accounted}
    place = {info.name: number for number, info in enumerate(stored.values())}
    place |= {name: place[coded.parts["codes"].name] for name, coded in claims.coded.items()}
    tensors |= {name: coded.info for name, coded in claims.coded.items()}
    view = View(
        {name: tensors[name] for name in sorted(tensors, key=place.__getitem__)},
        claims.coded,
        claims.companions,
        claims.set_aside,
        _words(method, claims),
        tuple(claims.notes),
    )
    return view, claims.faults


def _unexplained(claims: Claims, method: str | None, source: str) -> list[DistillError]:
    """Codes and companions that belong to no weight."""
    faults: list[DistillError] = []
    if method is not None:
        why, action = f"{method} does not explain it", USE_PLAIN
    else:
        why = "config.json declares no quantisation"
        action = "Add the quantization_config of the original model to config.json"
    for name, info in claims.stored.items():
        if name in claims.companions or name in claims.set_aside or name in claims.coded:
            continue
        if info.dtype in CODE_DTYPES or name.endswith(CODE_SUFFIXES):
            place = f"tensor {shown(name)} of dtype {info.dtype} in {shown(info.file.name)}"
            faults.append(BadDataError(f"{source}: {place} holds codes, but {why}", action))
    return faults


def _words(method: str | None, claims: Claims) -> str | None:
    if method is None:
        return None
    labels = sorted({coded.label for coded in claims.coded.values()})
    return f"{method}: {', '.join(labels) or 'declared, but every tensor is stored plainly'}"
