"""What is written down of a unit of work and of its tensors: for its part, and for run.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict


class TensorFacts(TypedDict, total=False):
    """What run.json says of a tensor: who it is, what became of it and how."""

    name: str
    role: str
    shape: list[int]
    expert: int
    layer: int | str | None
    fate: str
    reason: str
    stage: str
    format: str
    rank: int
    sources: list[list[str | float]]
    teacher_experts: list[list[float]]
    projection: str
    projection_fallback: str
    alignment: str
    matched_similarity: float
    permutation: list[int] | dict[str, list[int]]
    norm: str
    kept_entries: float
    delta_norm: float
    relative_delta: float
    residual: float
    energy: float
    factorisation: str


class UnitFacts(TypedDict, total=False):
    """What a part, and run.json but for the tensors, say of a unit of work.

    Beside its place: how experts were clustered, and counts by tensor of what could not be used.
    """

    label: str
    layer: int | None
    teacher_layers: list[list[float]]
    tensors: list[TensorFacts]
    experts: Mapping[str, object]
    replaced_by_zero: dict[str, int]
    norm_channels_not_folded: dict[str, int]
