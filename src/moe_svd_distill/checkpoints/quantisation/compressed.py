"""compressed-tensors, the format of llm-compressor: FP8, INT8, W4A16, NVFP4, MXFP4, MXFP8.

``weight`` or ``weight_packed`` with ``weight_scale`` and, as the scheme has it, ``weight_zero_point``,
``weight_shape``, ``weight_global_scale``, ``weight_g_idx``. What is quantised shows in the tensors; the configuration
says how.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_svd_distill.checkpoints.configuration import USE_PLAIN, block_size, listed, matches, plain, whole_number
from moe_svd_distill.checkpoints.quantisation.coded import WORD, Codes, Part, Scaled, align, blocks, grid_words
from moe_svd_distill.checkpoints.quantisation.weights import Weights
from moe_svd_distill.checkpoints.quantisation.zero_points import refuse_unless_middle
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.files.dtypes import BYTES_PER_ELEMENT
from moe_svd_distill.files.header import TensorInfo

WHOLE_BITS = (1, 2, 4, 8)  # other widths are packed differently by different versions of the library
ELEMENT_DTYPES = {"float": ("F8_E4M3",), "int": ("I8",)}
EXPONENTS = ("U8", "F8_E8M0")
SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E4M3")

FORMATS = frozenset(
    {
        *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"),
        *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
    }
)
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
REGEX = "re:"
LINEAR = "Linear"


def read_compressed(weights: Weights, settings: Mapping[str, object]) -> None:
    """Claim every module with a ``weight_packed`` or a ``weight_scale``.

    Raises:
        BadDataError: A scheme that is not read here.
    """
    schemes = read_schemes(settings)
    modules = [module for suffix in (".weight_packed", ".weight_scale") for module, _ in weights.named(suffix)]
    for module in dict.fromkeys(modules):
        packed, plain = (weights.stored.get(f"{module}.{own}") for own in ("weight_packed", "weight"))
        codes, scale = packed or plain, weights.stored.get(f"{module}.weight_scale")
        if codes is None or scale is None:
            missing, found = ("weight", "weight_scale") if codes is None else ("weight_scale", "weight_packed")
            weights.fault(f"{shown(f'{module}.{found}')} has no {shown(f'{module}.{missing}')} beside it")
            continue
        scheme = scheme_of(module, schemes)
        if scheme is None:
            weights.fault(f"{shown(codes.name)} is quantised, but no scheme of config.json is for it alone", USE_PLAIN)
        else:
            _claim(weights, module, scheme, codes, scale)


def _claim(weights: Weights, module: str, scheme: Scheme, codes: TensorInfo, scale: TensorInfo) -> None:
    """One weight, if its tensors are what the scheme says."""
    packing = _packing(scheme, codes)
    if packing is None:
        weights.fault(
            f"{shown(codes.name)} is {codes.dtype} of shape {list(codes.shape)}, which does not fit config.json or is "
            f"not read here ({scheme.kind} of {scheme.bits} bits)",
            USE_PLAIN,
        )
        return
    shape = _shape(weights, module, scheme, codes, packing)
    if shape is None:
        return
    block = scheme.block_of(shape)
    grid = tuple(blocks(length, side) for length, side in zip(shape, block, strict=True))
    exponents = scale.dtype in EXPONENTS
    if align(shape, scale.shape) != grid or not (exponents or scale.dtype in SCALE_DTYPES):
        weights.misfit(codes, scale, f"{scheme.strategy} scales {list(grid)}")
        return
    parts: dict[Part, TensorInfo] = {"codes": codes, "scale": scale}
    stored = weights.stored
    if (index := stored.get(f"{module}.weight_g_idx")) is not None:
        if index.shape != shape[1:] or index.dtype not in ("I32", "I64"):
            weights.misfit(codes, index, f"I32 {list(shape[1:])}")
            return
        parts["column_group"] = index
    if (overall := stored.get(f"{module}.weight_global_scale")) is not None:
        parts["global_scale"] = overall
    elif scheme.strategy == "tensor_group":
        weights.companion(codes, f"{module}.weight_global_scale")
        return
    zero_words = False
    if not scheme.symmetric:
        zero = weights.companion(codes, f"{module}.weight_zero_point")
        if zero is None:
            return
        zero_words = packing == "words" and zero.dtype == "I32"
        expected = (blocks(shape[0] * scheme.bits, WORD), grid[1]) if zero_words else grid
        if (zero.shape if zero_words else align(shape, zero.shape)) != expected:
            weights.misfit(codes, zero, f"zero points {list(expected)}")
            return
        parts["zero"] = zero
    elif (zero := stored.get(f"{module}.weight_zero_point")) is not None:
        refuse_unless_middle(weights, zero, scheme.bits, zero.shape[-1] * WORD // scheme.bits, "symmetric")
    coding = Scaled(packing, block, scheme.bits, exponents, zero_words)
    unused = weights.activations(f"{module}.")
    for name in ("weight_shape", "weight_zero_point"):
        if (info := stored.get(f"{module}.{name}")) is not None:
            unused[name] = info
    kind = ("mx" if exponents else "nv" if overall is not None else "") + ("fp" if scheme.kind == "float" else "int")
    label = f"{kind}{scheme.bits} {grid_words(block, shape)}"
    weights.claim(f"{module}.weight", shape, coding, parts, label, unused)


def _packing(scheme: Scheme, codes: TensorInfo) -> Codes | None:
    """How the codes lie in the tensor, or ``None`` if it is not what the scheme says."""
    if len(codes.shape) != 2:
        return None
    if not codes.name.endswith("_packed"):
        return "element" if scheme.bits == 8 and codes.dtype in ELEMENT_DTYPES.get(scheme.kind, ()) else None
    if scheme.kind == "int":
        return "words" if codes.dtype == "I32" and scheme.bits in WHOLE_BITS else None
    return "e2m1" if codes.dtype == "U8" and scheme.bits == 4 else None


def _shape(weights: Weights, module: str, scheme: Scheme, codes: TensorInfo, packing: str) -> tuple[int, int] | None:
    """The weight's own shape. The last word of a row may be ragged, so ``weight_shape`` says where the row ends."""
    rows, width = codes.shape
    if packing != "words":
        return rows, width * (2 if packing == "e2m1" else 1)
    said = weights.stored.get(f"{module}.weight_shape")
    raw = None if said is None else weights.read_bytes(said, said.bytes)
    if said is None or raw is None:
        return rows, width * WORD // scheme.bits
    size = BYTES_PER_ELEMENT[said.dtype]
    numbers = tuple(int.from_bytes(raw[at : at + size], "little", signed=True) for at in range(0, len(raw), size))
    if len(numbers) != 2 or numbers[0] != rows or blocks(numbers[1] * scheme.bits, WORD) != width:
        weights.fault(f"{shown(said.name)} says {list(numbers)}, which does not fit the {rows}×{width} words")
        return None
    return numbers[0], numbers[1]


@dataclass(frozen=True)
class Scheme:
    """How the weights of one group are quantised.

    Attributes:
        targets: Module names, patterns after ``re:``, or names of module classes.
        bits: Bits of a code.
        kind: ``int`` or ``float``.
        strategy: Which elements share a scale.
        group: Columns that share one, of the group strategies.
        block: Rows and columns that share one, of the block strategy.
        symmetric: Without zero points.
    """

    targets: tuple[str, ...]
    bits: int
    kind: str
    strategy: str
    group: int
    block: tuple[int, int] | None
    symmetric: bool

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The block of elements that shares one scale."""
        if self.strategy == "tensor":
            return shape
        if self.strategy == "channel":
            return 1, shape[1]
        return self.block if self.block is not None else (1, self.group)


def read_schemes(settings: Mapping[str, object]) -> tuple[Scheme, ...]:
    """The schemes that quantise weights.

    Raises:
        BadDataError: A format that is not read here, or settings that contradict each other.
    """
    groups = settings.get("config_groups")
    if not isinstance(groups, dict):
        raise BadDataError("config.json has a compressed-tensors quantisation without config_groups", USE_PLAIN)
    groups = {name: group if isinstance(group, dict) else {} for name, group in groups.items()}
    sparsity = settings.get("sparsity_config")
    formats = [settings.get("format"), *(group.get("format") for group in groups.values())]
    formats += [sparsity.get("format")] if isinstance(sparsity, dict) else []
    for name in formats:
        if name is not None and name not in FORMATS:
            raise BadDataError(f"compressed-tensors format {plain(name)} is not read here", USE_PLAIN)
    if settings.get("transform_config"):
        raise BadDataError(
            "config.json has a transform_config: the weights are stored rotated, and are not the model's own", USE_PLAIN
        )
    return tuple(
        _scheme(group, group["weights"]) for group in groups.values() if isinstance(group.get("weights"), dict)
    )


def _scheme(group: Mapping[str, object], weights: Mapping[str, object]) -> Scheme:
    size = whole_number(weights, "group_size", 0)
    default = "tensor" if size == 0 else "channel" if size < 0 else "group"
    strategy = weights.get("strategy") or default
    structure = weights.get("block_structure")
    if isinstance(structure, str):
        structure = [int(side) for side in re.findall(r"\d+", structure)]
    block = block_size(structure) if strategy == "block" else None
    if (
        strategy not in STRATEGIES
        or (strategy.endswith("group") and size < 1)
        or (strategy == "block" and block is None)
    ):
        what = f"strategy {plain(strategy)} with group_size {size} and block_structure {shown(structure)}"
        raise BadDataError(f"compressed-tensors {what} is not read here", USE_PLAIN)
    targets = tuple(target for target in listed(group, "targets") if isinstance(target, str))
    kind = weights.get("type") or "int"
    bits = whole_number(weights, "num_bits", 8)
    return Scheme(targets, bits, str(kind), strategy, size, block, weights.get("symmetric") is not False)


def scheme_of(module: str, schemes: Sequence[Scheme]) -> Scheme | None:
    """The scheme that a quantised module follows: by its name, else by a pattern, else by a module class.

    A class cannot be seen in a checkpoint; of several schemes with classes, linear layers are taken to be meant.
    """
    for scheme in schemes:
        if module in scheme.targets:
            return scheme
    for scheme in schemes:
        for target in scheme.targets:
            if target.startswith(REGEX) and matches(target.removeprefix(REGEX), module, anywhere=False):
                return scheme
    by_class = [scheme for scheme in schemes if any(_is_class(target) for target in scheme.targets)]
    linear = [scheme for scheme in by_class if LINEAR in scheme.targets]
    candidates = linear or by_class
    return candidates[0] if len(candidates) == 1 else None


def _is_class(target: str) -> bool:
    return not target.startswith(REGEX) and "." not in target and target[:1].isupper()
