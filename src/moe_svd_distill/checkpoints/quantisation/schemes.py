"""The schemes of a compressed-tensors configuration, and which of them a module follows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_svd_distill.checkpoints.quantisation.declared import USE_PLAIN, plain, whole_number
from moe_svd_distill.checkpoints.quantisation.float8 import block_size
from moe_svd_distill.errors import BadDataError, shown

FORMATS = frozenset(
    {
        *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"),
        *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
    }
)
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
REGEX = "re:"
LINEAR = "Linear"


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


def read_schemes(settings: Mapping[str, Any]) -> tuple[Scheme, ...]:
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


def _scheme(group: Mapping[str, Any], weights: Mapping[str, Any]) -> Scheme:
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
    targets = tuple(target for target in group.get("targets") or () if isinstance(target, str))
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
            if target.startswith(REGEX) and _matches(target.removeprefix(REGEX), module):
                return scheme
    by_class = [scheme for scheme in schemes if any(_is_class(target) for target in scheme.targets)]
    linear = [scheme for scheme in by_class if LINEAR in scheme.targets]
    candidates = linear or by_class
    return candidates[0] if len(candidates) == 1 else None


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise BadDataError(f"config.json has the pattern {shown(pattern)}: {error}", USE_PLAIN) from error


def _is_class(target: str) -> bool:
    return not target.startswith(REGEX) and "." not in target and target[:1].isupper()
