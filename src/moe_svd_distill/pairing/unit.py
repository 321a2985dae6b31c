"""The unit of work: pure data, made without a device, that can run anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Source:
    """A teacher tensor and its weight in the blend."""

    name: str
    weight: float


@dataclass(frozen=True)
class TensorTask:
    """What is to be done with one student tensor.

    Attributes:
        name: Hub name in the student.
        role: Its meaning.
        expert: Expert number, or None.
        shape: Its shape.
        sources: Teacher tensors it is made from; empty for routed experts, whose sources the clustering decides.
        change: Whether a delta is computed.
        pair: Whether the adapter holds a LoRA pair for it; a pair without a change is all zeros, because an adapter
            must cover every module of a class it targets.
        rank: Rank of the pair; 0 without one.
        reason: Why nothing is changed; empty where something is.
    """

    name: str
    role: str
    expert: int | None
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    change: bool
    pair: bool
    rank: int
    reason: str


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one teacher layer.

    Attributes:
        layer: Teacher layer.
        weight: Its weight in the depth blend.
        router: Hub name of the router.
        tensors: For each expert the hub names of (gate, up, down).
    """

    layer: int
    weight: float
    router: str
    tensors: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class UnitOfWork:
    """One student decoder layer, the embeddings, or the head.

    Attributes:
        label: Its name for people, for example ``layer 3``.
        layer: Student layer, or None.
        teacher_layers: (teacher layer, weight) pairs.
        tasks: Every student tensor of the unit.
        norms: Norm role to (student tensor, teacher sources), for folding gains.
        teacher_experts: The teacher's expert layers behind this one; empty where there are none.
        cost: Bytes read, as an estimate of relative cost.
        key: Hash of all the unit depends on; empty until ``with_key``.
    """

    label: str
    layer: int | None
    teacher_layers: tuple[tuple[int, float], ...]
    tasks: tuple[TensorTask, ...]
    norms: tuple[tuple[str, str, tuple[Source, ...]], ...] = ()
    teacher_experts: tuple[ExpertLayer, ...] = ()
    cost: int = 0
    key: str = ""

    @property
    def weight(self) -> float:
        """Relative cost, as the supervisor wants it."""
        return float(self.cost)

    def norm(self, role: str | None) -> tuple[str, tuple[Source, ...]] | None:
        """Student tensor and teacher sources of a norm role."""
        return next(((name, sources) for known, name, sources in self.norms if known == role), None)


def with_key(unit: UnitOfWork, context: Mapping[str, Any]) -> UnitOfWork:
    """The unit with the hash of its content and of everything else its result depends on.

    Args:
        unit: The unit.
        context: Algorithm and library versions, device class, threads, settings, fingerprints of both models.
    """
    content = {"context": dict(context), "unit": asdict(replace(unit, key=""))}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    return replace(unit, key=digest.hexdigest()[:32])
