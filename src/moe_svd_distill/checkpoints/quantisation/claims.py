"""What a format's reader gets and fills: the settings in ``config.json``, and which stored tensor belongs to which
weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_svd_distill.checkpoints.quantisation.coded import Coded, Coding, Part
from moe_svd_distill.errors import BadDataError, DistillError, shown
from moe_svd_distill.files.dtypes import TORCH_NAMES
from moe_svd_distill.files.header import TensorInfo
from moe_svd_distill.files.reading import FETCH_AGAIN


class Bytes(Protocol):
    """Reads a small stored tensor, or so many bytes from the beginning of one; ``None`` where the file is not here."""

    def __call__(self, info: TensorInfo, count: int | None = None, /) -> bytes | None: ...


ACTIVATIONS = (
    *("input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "activation_scale"),
    *("output_scale", "output_zero_point", "output_global_scale", "qscale_act"),
)
CACHE = re.compile(r"(.*\.)?(q|k|v|kv|prob)_(global_)?(scale|zero_point)")
OF_THE_CACHE = "quantises the attention or its cache when the model serves; no weight needs it"
WIDE = frozenset({"F16", "BF16"})

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
METHODS = (
    *("fp8", "fbgemm_fp8", "mxfp8", "modelopt", "compressed-tensors", "mxfp4"),
    *("awq", "gptq", "auto-round", "bitsandbytes"),
)
BESIDE = ("expert_dtype",)
"""What a model says of its quantisation outside of it: DeepSeek-V4."""
PLAIN_WORD = re.compile(r"[\w.-]{1,40}")
USE_PLAIN = "Give the bf16 checkpoint"
DTYPES = {TORCH_NAMES[code]: code for code in ("F32", "F16", "BF16")}


@dataclass
class Claims:
    """The stored tensors of a model, and what is made of them.

    Attributes:
        stored: Everything that the headers name.
        dtype: The dtype of a weight whose scales do not say one.
        read_bytes: See ``Bytes``.
        coded: Name of a weight to how it is stored.
        companions: Name of a stored tensor to that of the weight it belongs to, other than by its own name.
        set_aside: Name of a stored tensor that belongs to no weight to the reason why none needs it.
        notes: Where the configuration says something else than the tensors, which count.
        faults: All that is wrong.
    """

    stored: Mapping[str, TensorInfo]
    dtype: str
    read_bytes: Bytes
    coded: dict[str, Coded] = field(default_factory=dict)
    companions: dict[str, str] = field(default_factory=dict)
    set_aside: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[DistillError] = field(default_factory=list)

    def named(self, suffix: str) -> Iterator[tuple[str, TensorInfo]]:
        """The stored tensors with a suffix, and their names without it."""
        for name, info in self.stored.items():
            if name.endswith(suffix) and len(name) > len(suffix):
                yield name.removesuffix(suffix), info

    def claim(
        self,
        name: str,
        shape: tuple[int, ...],
        coding: Coding,
        parts: Mapping[Part, TensorInfo],
        label: str,
        unused: Mapping[str, TensorInfo] | None = None,
    ) -> None:
        """Make one weight of its parts; ``unused`` are companions that its numbers do not depend on."""
        codes, scale = parts["codes"], parts.get("scale")
        dtype = scale.dtype if scale is not None and scale.dtype in WIDE else self.dtype
        owned = {info.name: info for info in (*parts.values(), *(unused or {}).values())}
        if name in self.coded or (name in self.stored and name not in owned):
            self.fault(f"{shown(name)} is stored twice, one time as codes ({shown(codes.name)})")
            return
        total = sum(info.bytes for info in owned.values())
        info = TensorInfo(name, shape, dtype, total, codes.file, codes.offset)
        self.coded[name] = Coded(info, coding, dict(parts), label)
        self.companions |= {stored: name for stored in owned if stored != name}

    def activations(self, module: str) -> dict[str, TensorInfo]:
        """The companions of a module that only quantise what flows through it; ``module`` ends with its separator."""
        return {name: self.stored[name] for suffix in ACTIVATIONS if (name := module + suffix) in self.stored}

    def fault(self, what: str, action: str = FETCH_AGAIN) -> None:
        """Note what is wrong."""
        self.faults.append(BadDataError(what, action))

    def misfit(self, codes: TensorInfo, other: TensorInfo, expected: str) -> None:
        """Note that a companion's shape or dtype does not fit the codes."""
        self.fault(
            f"{shown(other.name)} is {other.dtype} {list(other.shape)} beside {shown(codes.name)}, which is "
            f"{codes.dtype} {list(codes.shape)} (expected {expected})"
        )

    def set_cache_aside(self) -> None:
        """Account for the scales of a quantised key and value cache."""
        taken = self.companions.keys() | self.coded.keys()
        for name, info in self.stored.items():
            if name not in taken and CACHE.fullmatch(name) and len(info.shape) <= 2:
                self.set_aside[name] = OF_THE_CACHE


def declared_quantisation(config: Mapping[str, Any], source: str) -> tuple[str, Mapping[str, Any]] | None:
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
