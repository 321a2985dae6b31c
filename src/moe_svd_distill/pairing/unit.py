"""The unit of work: pure data, made without a device, that can run anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from moe_svd_distill.roles import TensorView


@dataclass(frozen=True)
class Source:
    """A matrix of the teacher and its weight in the blend."""

    view: TensorView
    weight: float


@dataclass(frozen=True)
class TensorTask:
    """What is to be done with one matrix or vector of the student.

    Attributes:
        view: Where it is stored.
        role: Its meaning.
        expert: Expert number, or None.
        shape: Its shape.
        sources: What of the teacher it is made from; empty for routed experts, whose sources the clustering decides.
        change: Whether a LoRA pair is made.
        rank: Rank of the pair.
        reason: Why nothing is changed; empty where something is.
    """

    view: TensorView
    role: str
    expert: int | None
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    change: bool
    rank: int
    reason: str

    @property
    def name(self) -> str:
        """The view's name."""
        return self.view.name


@dataclass(frozen=True)
class Norm:
    """The norms that feed a role, for folding gains.

    Attributes:
        role: What reads them.
        student: The student's.
        sources: The teacher's.
        offsets: What teacher and student add to the weight before they multiply by it.
    """

    role: str
    student: TensorView
    sources: tuple[Source, ...]
    offsets: tuple[float, float]


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one teacher layer.

    Attributes:
        layer: Teacher layer.
        weight: Its weight in the depth blend.
        router: The router.
        tensors: (gate, up, down) of each expert.
        shapes: Shapes of the three, the same for all.
    """

    layer: int
    weight: float
    router: TensorView
    tensors: tuple[tuple[TensorView, TensorView, TensorView], ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UnitOfWork:
    """One student decoder layer, the embeddings, or the head.

    Attributes:
        label: Its name for people, for example ``layer 3``.
        layer: Student layer, or None.
        teacher_layers: (teacher layer, weight) pairs.
        tasks: Everything of the unit.
        norms: What feeds its matrices.
        teacher_experts: The teacher's expert layers behind this one; empty where there are none.
        embeddings: Hub names of the teacher's and the student's embeddings, where both have them.
        cost: Bytes read, as an estimate of relative cost.
        key: Hash of all the unit depends on; empty until ``with_key``.
    """

    label: str
    layer: int | None
    teacher_layers: tuple[tuple[int, float], ...]
    tasks: tuple[TensorTask, ...]
    norms: tuple[Norm, ...] = ()
    teacher_experts: tuple[ExpertLayer, ...] = ()
    embeddings: tuple[str, str] | None = None
    cost: int = 0
    key: str = ""

    @property
    def weight(self) -> float:
        """Relative cost, as the supervisor wants it."""
        return float(self.cost)

    def norm(self, role: str) -> Norm | None:
        """What feeds a role, or None where nothing of the teacher's can be folded into it."""
        return next((norm for norm in self.norms if norm.role == role), None)


def with_key(unit: UnitOfWork, context: Mapping[str, Any]) -> UnitOfWork:
    """The unit with the hash of its content and of everything else its result depends on.

    Args:
        unit: The unit.
        context: Algorithm and library versions, device class, threads, settings, fingerprints of both models.
    """
    content = {"context": dict(context), "unit": asdict(replace(unit, key=""))}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    return replace(unit, key=digest.hexdigest()[:32])
