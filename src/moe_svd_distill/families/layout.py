"""A model's tensors, each with its meaning: the join of a checkpoint's names and its family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families.family import Axis, Family, Geometry, TensorRole


@dataclass(frozen=True)
class Meaning:
    """What one tensor is.

    Attributes:
        name: The hub name.
        role: Its entry in the family.
        layer: Decoder layer, or None for embeddings, final norm and head.
        expert: Expert number, or None.
    """

    name: str
    role: TensorRole
    layer: int | None
    expert: int | None


@dataclass(frozen=True)
class ModelLayout:
    """Every tensor of a model and what it means.

    Attributes:
        family: The architecture.
        geometry: The sizes from config.json.
        meanings: Hub name to meaning, for the tensors the family knows.
        ignored: Hub name to the reason why no loaded model uses the tensor.
        unknown: Hub names that the family does not know.
    """

    family: Family
    geometry: Geometry
    meanings: Mapping[str, Meaning]
    ignored: Mapping[str, str]
    unknown: tuple[str, ...]

    @cached_property
    def by_place(self) -> dict[tuple[str, int | None, int | None], str]:
        """(role, layer, expert) to hub name."""
        return {(m.role.role, m.layer, m.expert): name for name, m in self.meanings.items()}

    def find(self, role: str, layer: int | None = None, expert: int | None = None) -> str | None:
        """The hub name of a role at a place, or None where the model has none."""
        return self.by_place.get((role, layer, expert))

    def experts_at(self, layer: int) -> int:
        """How many routed experts a layer has; 0 for a dense layer."""
        return self._experts.get(layer, 0)

    @cached_property
    def _experts(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for meaning in self.meanings.values():
            if meaning.role.role == "experts.gate" and meaning.layer is not None:
                counts[meaning.layer] = counts.get(meaning.layer, 0) + 1
        return counts


def read_layout(family: Family, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelLayout:
    """Give every tensor its meaning and check the shapes against config.json.

    Args:
        family: The architecture.
        config: The parsed config.json.
        shapes: Hub name to shape.

    Raises:
        BadDataError: A required tensor is missing or a shape contradicts config.json; all faults in one line.
    """
    geometry = family.geometry(config)
    meanings: dict[str, Meaning] = {}
    ignored: dict[str, str] = {}
    unknown: list[str] = []
    faults: list[str] = []
    for name, shape in shapes.items():
        meaning = _meaning(family, name)
        reason = _ignored(family, geometry, name, meaning)
        if reason:
            ignored[name] = reason
        elif meaning is None:
            unknown.append(name)
        else:
            meanings[name] = meaning
            faults += _shape_faults(meaning, shape, geometry)
    faults += _missing(family, geometry, meanings)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise BadDataError(faults[0] + more, "Download the model again, or repair config.json")
    return ModelLayout(family, geometry, meanings, ignored, tuple(sorted(unknown)))


def _meaning(family: Family, name: str) -> Meaning | None:
    for role in family.roles:
        if match := role.pattern.match(name):
            groups = match.groupdict()
            layer, expert = groups.get("layer"), groups.get("expert")
            return Meaning(name, role, None if layer is None else int(layer), None if expert is None else int(expert))
    return None


def _ignored(family: Family, geometry: Geometry, name: str, meaning: Meaning | None) -> str | None:
    for pattern, reason in family.ignored.items():
        if re.fullmatch(pattern, name):
            return reason
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer.group(1)) >= geometry.layers:
        return f"belongs to a layer beyond the {geometry.layers} decoder layers (multi-token prediction), not loaded"
    if meaning and meaning.role.role == "head" and geometry.tied_embeddings:
        return "the head is tied to the embeddings"
    return None


def _expected(axis: Axis, meaning: Meaning, geometry: Geometry) -> int | None:
    if axis is Axis.NEURONS:
        if meaning.role.role.startswith("experts."):
            return geometry.expert_neurons
        return geometry.neurons if meaning.role.role.startswith("dense.") else None
    return {
        Axis.RESIDUAL: geometry.hidden,
        Axis.QUERY_HEADS: geometry.query_heads * geometry.head_dimension,
        Axis.KEY_VALUE_HEADS: geometry.key_value_heads * geometry.head_dimension,
        Axis.HEAD_DIMENSION: geometry.head_dimension,
        Axis.EXPERTS: geometry.experts,
        Axis.VOCABULARY: geometry.vocabulary,
    }[axis]


def _shape_faults(meaning: Meaning, shape: tuple[int, ...], geometry: Geometry) -> Iterable[str]:
    expected = tuple(_expected(axis, meaning, geometry) for axis in meaning.role.axes)
    fits = len(shape) == len(expected) and all(e is None or e == s for s, e in zip(shape, expected, strict=True))
    if not fits:
        wanted = "×".join("any" if e is None else str(e) for e in expected)
        yield f"{meaning.name} is {'×'.join(map(str, shape))}, expected {wanted} from config.json"


def _missing(family: Family, geometry: Geometry, meanings: Mapping[str, Meaning]) -> list[str]:
    places = {(m.role.role, m.layer, m.expert) for m in meanings.values()}
    faults = []
    for role in family.roles:
        if role.optional:
            continue
        layers = range(geometry.layers) if "{layer}" in role.template else (None,)
        faults += [f"{role.name(layer)} is missing" for layer in layers if (role.role, layer, None) not in places]
    if not geometry.tied_embeddings and family.has_role("head") and ("head", None, None) not in places:
        faults.append(f"{family.role('head').name()} is missing and config.json does not tie the embeddings")
    for layer in range(geometry.layers):
        faults += _missing_mlp(family, geometry, layer, places)
    return faults


def _missing_mlp(
    family: Family, geometry: Geometry, layer: int, places: set[tuple[str, int | None, int | None]]
) -> Iterable[str]:
    dense = [role for role in family.roles if role.role in ("dense.gate", "dense.up", "dense.down")]
    routed = [role for role in family.roles if role.role in ("experts.gate", "experts.up", "experts.down")]
    found_dense = [role for role in dense if (role.role, layer, None) in places]
    found_experts = {
        (role.role, expert)
        for role in routed
        for expert in range(geometry.experts)
        if (role.role, layer, expert) in places
    }
    if found_experts:
        for role in routed:
            for expert in range(geometry.experts):
                if (role.role, expert) not in found_experts:
                    yield f"{role.name(layer, expert)} is missing"
        if ("router", layer, None) not in places:
            yield f"{family.role('router').name(layer)} is missing"
    elif len(found_dense) < len(dense) or not dense:
        yield f"layer {layer} has neither a whole dense MLP nor experts"
