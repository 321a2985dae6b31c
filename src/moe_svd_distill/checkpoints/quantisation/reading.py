"""From the stored tensors of a model to its weights: every stored tensor is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moe_svd_distill.checkpoints.configuration import USE_PLAIN, declared_quantisation, model_dtype
from moe_svd_distill.checkpoints.quantisation.compressed import read_compressed
from moe_svd_distill.checkpoints.quantisation.formats import (
    read_auto_round,
    read_awq,
    read_bitsandbytes,
    read_gptq,
    read_mxfp4,
)
from moe_svd_distill.checkpoints.quantisation.scaled import read_float8, read_modelopt, read_mxfp8
from moe_svd_distill.checkpoints.quantisation.weights import ReadBytes, Weights
from moe_svd_distill.errors import BadDataError, DistillError, shown
from moe_svd_distill.files.header import TensorInfo

READERS: dict[str, Callable[[Weights, Mapping[str, object]], None]] = {
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


def read_weights(
    stored: Mapping[str, TensorInfo], config: Mapping[str, object], source: str, read_bytes: ReadBytes
) -> Weights:
    """The weights that the stored tensors make up, with all that is wrong with them.

    Codes that nothing explains are a fault: they are never handed out as numbers.
    """
    weights = Weights(stored, model_dtype(config), read_bytes)
    try:
        method, settings = declared_quantisation(config, source) or (None, {})
        if method is not None:
            READERS[method](weights, settings)
            weights.set_cache_aside()
    except DistillError as fault:
        return Weights.as_stored(stored, [fault, *weights.faults])
    if not weights.faults:
        weights.faults += _unexplained(weights, method, source)
    accounted = weights.companions.keys() | weights.set_aside.keys() | weights.coded.keys()
    tensors = {name: info for name, info in stored.items() if name not in accounted}
    place = {info.name: number for number, info in enumerate(stored.values())}
    place |= {name: place[coded.parts["codes"].name] for name, coded in weights.coded.items()}
    tensors |= {name: coded.info for name, coded in weights.coded.items()}
    weights.tensors = {name: tensors[name] for name in sorted(tensors, key=place.__getitem__)}
    if method is not None:
        labels = sorted({coded.label for coded in weights.coded.values()})
        words = ", ".join(labels) or "declared, but every tensor is stored plainly"
        weights.quantisation = f"{method}: {words}"
    return weights


def _unexplained(weights: Weights, method: str | None, source: str) -> list[DistillError]:
    """Codes and companions that belong to no weight."""
    faults: list[DistillError] = []
    if method is not None:
        why, action = f"{method} does not explain it", USE_PLAIN
    else:
        why = "config.json declares no quantisation"
        action = "Add the quantization_config of the original model to config.json"
    for name, info in weights.stored.items():
        if name in weights.companions or name in weights.set_aside or name in weights.coded:
            continue
        if info.dtype in CODE_DTYPES or name.endswith(CODE_SUFFIXES):
            place = f"tensor {shown(name)} of dtype {info.dtype} in {shown(info.file.name)}"
            faults.append(BadDataError(f"{source}: {place} holds codes, but {why}", action))
    return faults
