"""The stored tensors of a model, and the weights that they make up: every one of them is accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from moe_svd_distill.checkpoints.quantisation.coded import Coded, Coding, Part
from moe_svd_distill.errors import BadDataError, DistillError, shown
from moe_svd_distill.files.header import TensorInfo
from moe_svd_distill.files.reading import FETCH_AGAIN

ReadBytes: TypeAlias = Callable[[TensorInfo, int], bytes | None]
"""Reads so many bytes from the beginning of a small stored tensor; ``None`` where the file is not here."""

ACTIVATIONS = (
    *("input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "activation_scale"),
    *("output_scale", "output_zero_point", "output_global_scale", "qscale_act"),
)
CACHE = re.compile(r"(.*\.)?(q|k|v|kv|prob)_(global_)?(scale|zero_point)")
OF_THE_CACHE = "quantises the attention or its cache when the model serves; no weight needs it"
WIDE = frozenset({"F16", "BF16"})


@dataclass
class Weights:
    """The weights of a model; whoever reads a format claims them one by one.

    Attributes:
        stored: Everything that the headers name.
        dtype: The dtype of a weight whose scales do not say one.
        read_bytes: See ``ReadBytes``.
        tensors: Name to shape and dtype of the weight; its ``bytes`` are those in the files, companions included.
        coded: Name of a weight to how it is stored, for those that are quantised.
        companions: Name of a stored tensor to that of the weight it belongs to, other than by its own name.
        set_aside: Name of a stored tensor that belongs to no weight to the reason why none needs it.
        quantisation: Method and codings in words, or ``None`` for a plain model.
        notes: Where the configuration says something else than the tensors, which count.
        faults: All that is wrong.
    """

    stored: Mapping[str, TensorInfo]
    dtype: str = "BF16"
    read_bytes: ReadBytes = lambda info, count: None
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    coded: dict[str, Coded] = field(default_factory=dict)
    companions: dict[str, str] = field(default_factory=dict)
    set_aside: dict[str, str] = field(default_factory=dict)
    quantisation: str | None = None
    notes: list[str] = field(default_factory=list)
    faults: list[DistillError] = field(default_factory=list)

    @classmethod
    def as_stored(cls, stored: Mapping[str, TensorInfo], faults: Iterable[DistillError] = ()) -> Weights:
        """Each stored tensor a weight by itself."""
        return cls(stored, tensors=dict(stored), faults=list(faults))

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

    def companion(self, codes: TensorInfo, name: str) -> TensorInfo | None:
        """A stored tensor that codes need beside them; a fault where it is not there."""
        if name not in self.stored:
            self.fault(f"{shown(codes.name)} has no {shown(name)} beside it")
        return self.stored.get(name)

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
