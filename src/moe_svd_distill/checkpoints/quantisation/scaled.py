"""Floats of 8 and 4 bits with their scales beside them. The tensors themselves say what they are (``FLOAT_FORMATS``).

FP8 with scales in blocks, per row or per tensor, and MXFP8, whose scales are exponents of powers of two: DeepSeek-V3
and V4, Qwen3-FP8, MiniMax-M3, fbgemm, modelopt. ``weight_scale_inv`` is multiplied, despite its name. FP4 lies two to a
byte: MXFP4 as DeepSeek-V4 stores its experts (in I8), and NVFP4 as modelopt does, with ``weight_scale_2``, which is
multiplied too; the global scale of compressed-tensors divides. Fused experts of three dimensions have the suffixes at
the parameter's own name.

The configuration says the size of blocks, which a ragged last block hides, and is held against the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moe_svd_distill.checkpoints.configuration import USE_PLAIN, block_size, plain, whole_number
from moe_svd_distill.checkpoints.quantisation.coded import (
    Part,
    Scaled,
    align,
    blocks,
    fit_grid,
    grid_words,
)
from moe_svd_distill.checkpoints.quantisation.weights import Weights
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.header import TensorInfo

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
BYTES = frozenset({"I8", "U8"})
PLAIN_SCALES = frozenset({"F32", "F16", "BF16"})
EXPONENTS = frozenset({"U8", "F8_E8M0"})

SCALES = ("_scale_inv", "_scale", "_weight_scale")
"""After the name of the codes."""
MODULE_SCALES = (".scale", ".qscale_weight")
"""Instead of ``.weight``: DeepSeek-V4, Mistral."""
SECOND_SCALES = ("_scale_2", "_weight_scale_2")
OTHER_WEIGHTS = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
"""What modelopt multiplies inputs or adds outputs with: the weight without them is not the model's own."""

MODELOPT_BLOCK = (128, 128)
MX_GROUP, NV_GROUP = 32, 16
ALGORITHMS = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"),
    *("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8"),
)
MIXED = "MIXED_PRECISION"
_PACKED = {"e2m1": "fp4", "element": "fp8"}
"""How codes lie to what DeepSeek-V4 calls the dtype of its experts."""


@dataclass(frozen=True)
class FloatFormat:
    """One way to store a matrix of floats.

    Attributes:
        name: In the field's words.
        codes: Dtypes of the codes.
        scales: Dtypes of the scales; they are exponents if those are.
        group: Numbers of a row that share a scale; 0 where the shape of the scales and the configuration say it.
        packed: Whether two numbers lie in a byte.
        second: Whether there is a scale of the scales.
    """

    name: str
    codes: frozenset[str]
    scales: frozenset[str]
    group: int = 0
    packed: bool = False
    second: bool = False


FLOAT_FORMATS = (
    FloatFormat("float8", FLOAT8, PLAIN_SCALES),
    FloatFormat("mxfp8", FLOAT8, EXPONENTS),
    FloatFormat("mxfp4", BYTES, EXPONENTS, MX_GROUP, packed=True),
    FloatFormat("fp4", BYTES, PLAIN_SCALES, MX_GROUP, packed=True),
    FloatFormat("nvfp4", BYTES, frozenset({"F8_E4M3"}), NV_GROUP, packed=True, second=True),
)


@dataclass(frozen=True)
class Declared:
    """What the configuration says of the formats.

    Attributes:
        blocks: Sizes that a block of FP8 may have.
        groups: Numbers that share a scale of FP4; a format's own where it is among them or there are none.
        experts: ``fp4`` or ``fp8``: the experts of DeepSeek-V4.
        scales: ``float`` or ``ue8m0``.
    """

    blocks: tuple[tuple[int, int], ...] = ()
    groups: frozenset[int] = frozenset()
    experts: object = None
    scales: object = None


def read_float8(weights: Weights, settings: Mapping[str, object]) -> None:
    """Claim the FP8 tensors, and the FP4 experts of DeepSeek-V4."""
    _read(weights, settings, ())


def read_mxfp8(weights: Weights, settings: Mapping[str, object]) -> None:
    """Claim FP8 tensors in groups of 32 with exponents."""
    _read(weights, settings, () if settings.get("weight_block_size") else ((1, MX_GROUP),))


def read_modelopt(weights: Weights, settings: Mapping[str, object]) -> None:
    """Claim what modelopt exports as FP8, MXFP8, NVFP4 and MXFP4.

    Raises:
        BadDataError: Another algorithm, or sizes of groups that contradict each other.
    """
    layers = _inner(settings, "quantized_layers")
    for named in (settings.get("quant_algo"), *(layer.get("quant_algo") for layer in layers)):
        if named is not None and str(named).upper() not in (*ALGORITHMS, MIXED):
            known = ", ".join((*ALGORITHMS, MIXED))
            raise BadDataError(f"modelopt's quant_algo {plain(named)} is not read here (read are {known})", USE_PLAIN)
    groups = [group.get("weights") for group in _inner(settings, "config_groups")]
    said = [settings, *layers, *(group for group in groups if isinstance(group, dict))]
    sizes = frozenset(whole_number(part, "group_size", 0) for part in said) - {0}
    _read(weights, settings, (MODELOPT_BLOCK, (1, MX_GROUP)), sizes)
    for name in weights.stored:
        if name.endswith(OTHER_WEIGHTS):
            weights.fault(f"{shown(name)} changes what the layer computes, and is not read here", USE_PLAIN)


def _inner(settings: Mapping[str, object], key: str) -> list[dict[str, object]]:
    named = settings.get(key)
    return [part for part in named.values() if isinstance(part, dict)] if isinstance(named, dict) else []


def _read(
    weights: Weights,
    settings: Mapping[str, object],
    usual: tuple[tuple[int, int], ...],
    groups: frozenset[int] = frozenset(),
) -> None:
    block = block_size(settings.get("weight_block_size"))
    declared = Declared(
        ((block,) if block else ()) + usual, groups, settings.get("expert_dtype"), settings.get("scale_fmt")
    )
    for info in weights.stored.values():
        if info.name.endswith((*SCALES, *MODULE_SCALES)):
            continue
        scales = list(_beside(weights, info, SCALES, MODULE_SCALES))
        if info.dtype not in FLOAT8 and not (info.dtype in BYTES and (scales or info.name.endswith(".weight"))):
            continue
        if len(scales) != 1:
            found = " and ".join(shown(scale.name) for scale in scales) or "none"
            weights.fault(f"{shown(info.name)} is {info.dtype} and needs one scale beside it, found {found}")
            continue
        _claim(weights, info, scales[0], declared)
    _note_experts(weights, declared.experts)
    for module, scale in weights.named(MODULE_SCALES[0]):
        weight = weights.stored.get(f"{module}.weight")
        if weight is not None and scale.name not in weights.companions and not weights.faults:
            weights.misfit(weight, scale, "codes of FP8 or FP4 beside a scale")


def _beside(
    weights: Weights, codes: TensorInfo, suffixes: tuple[str, ...], of_module: tuple[str, ...] = ()
) -> Iterator[TensorInfo]:
    names = [codes.name + suffix for suffix in suffixes]
    if codes.name.endswith(".weight"):
        names += [codes.name.removesuffix(".weight") + suffix for suffix in of_module]
    return (weights.stored[name] for name in names if name in weights.stored)


def _claim(weights: Weights, codes: TensorInfo, scale: TensorInfo, declared: Declared) -> None:
    """One weight, if its tensors fit each other and what the configuration says."""
    if len(codes.shape) not in (2, 3):
        weights.fault(f"{shown(codes.name)} is {codes.dtype} of shape {list(codes.shape)} (expected 2 or 3 dimensions)")
        return
    fitting = [form for form in FLOAT_FORMATS if codes.dtype in form.codes and scale.dtype in form.scales]
    if not fitting:
        known = sorted({name for form in FLOAT_FORMATS if codes.dtype in form.codes for name in form.scales})
        weights.misfit(codes, scale, f"a scale of dtype {', '.join(known)}")
        return
    form = fitting[0]
    exponents = form.scales is EXPONENTS
    contradiction = _contradiction(form, declared)
    if contradiction:
        weights.misfit(codes, scale, contradiction)
        return
    shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if form.packed else codes.shape
    block, expected = _block(form, shape, scale.shape, declared)
    if block is None:
        weights.misfit(codes, scale, expected)
        return
    parts: dict[Part, TensorInfo] = {"codes": codes, "scale": scale}
    second = next(_beside(weights, codes, SECOND_SCALES), None)
    if form.second:
        if second is None:
            weights.fault(f"{shown(codes.name)} has no {shown(codes.name + SECOND_SCALES[0])} beside it")
            return
        count = math.prod(second.shape)
        if second.dtype not in PLAIN_SCALES or count not in {1, math.prod(shape[:-2])}:
            weights.misfit(
                codes, second, f"F32 with {' or '.join(map(str, sorted({1, math.prod(shape[:-2])})))} numbers"
            )
            return
        parts["second_scale"] = second
    elif second is not None:
        weights.misfit(codes, second, f"no second scale beside {form.name}")
        return
    name = "float8" if form.name == "mxfp8" and block[-2] > 1 else form.name
    module = codes.name.removesuffix("weight") if codes.name.endswith(".weight") else f"{codes.name}_"
    coding = Scaled("e2m1" if form.packed else "element", block, exponents=exponents)
    weights.claim(codes.name, shape, coding, parts, f"{name} {grid_words(block, shape)}", weights.activations(module))


def _contradiction(form: FloatFormat, declared: Declared) -> str | None:
    """What the configuration says instead."""
    if form.scales is EXPONENTS and declared.scales == "float":
        return "plain scales, as config.json says scale_fmt float"
    if form.packed and form.scales is PLAIN_SCALES and declared.experts != "fp4":  # could be integers
        return "exponents as scales, as config.json does not say expert_dtype fp4"
    return None


def _note_experts(weights: Weights, said: object) -> None:
    """Name experts of another format than config.json says; dtypes and the grid of their scales show which it is."""
    others = [
        (name, coded.label)
        for name, coded in weights.coded.items()
        if ".experts." in name
        and isinstance(coded.coding, Scaled)
        and _PACKED.get(coded.coding.codes) not in (None, said)
    ]
    if said in _PACKED.values() and others:
        name, label = others[0]
        more = f" and {len(others) - 1} more are" if len(others) > 1 else " is"
        weights.notes.append(
            f"config.json says expert_dtype {said}, but {shown(name)}{more} stored as {label}: read so"
        )


def _block(
    form: FloatFormat, shape: tuple[int, ...], scale: tuple[int, ...], declared: Declared
) -> tuple[tuple[int, ...] | None, str]:
    """The block of numbers that shares a scale, and what was expected if there is none."""
    if form.group:
        others = sorted(declared.groups) if form.group not in declared.groups else []
        if len(others) > 1:
            return None, f"one size of groups for {form.name}, config.json has {' and '.join(map(str, others))}"
        group = (*(1,) * (len(shape) - 1), *(others or [form.group]))
        grid = tuple(map(blocks, shape, group))
        return (group if align(shape, scale) == grid else None), f"scales {list(grid)} in groups of {group[-1]}"
    fits = [fit_grid(shape, scale, block) for block in declared.blocks or (None,)]
    fitting = [block for block in fits if block is not None]
    if not declared.blocks:
        expected = "a scale per tensor or per row, as config.json has no weight_block_size"
    else:
        sizes = " or ".join("×".join(map(str, block)) for block in declared.blocks)
        expected = f"a scale per tensor, per row, or per block of {sizes}"
    return (fitting[0] if fitting else None), expected
