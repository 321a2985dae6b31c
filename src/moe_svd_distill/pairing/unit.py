"""The unit of work: pure data, made without a device, that can run anywhere; and the teacher layers behind it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moe_svd_distill.errors import UsageError
from moe_svd_distill.roles import TensorView

Layers = tuple[tuple[int, float], ...]
"""(Teacher layer, weight) pairs."""


@dataclass(frozen=True)
class WeightedView:
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
    sources: tuple[WeightedView, ...]
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
    sources: tuple[WeightedView, ...]
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
        teacher_layers: The teacher's behind it.
        tasks: Everything of the unit.
        norms: What feeds its matrices.
        teacher_experts: The teacher's expert layers behind this one; empty where there are none.
        embeddings: Hub names of the teacher's and the student's embeddings, where both have them.
        cost: Bytes read, as an estimate of relative cost.
        key: Hash of all the unit depends on; empty until ``with_key``.
    """

    label: str
    layer: int | None
    teacher_layers: Layers
    tasks: tuple[TensorTask, ...]
    norms: tuple[Norm, ...] = ()
    teacher_experts: tuple[ExpertLayer, ...] = ()
    embeddings: tuple[str, str] | None = None
    cost: int = 0
    key: str = ""

    def views(self) -> tuple[list[TensorView], list[TensorView]]:
        """The matrices of the teacher and of the student that are read for what changes."""
        changing = [task for task in self.tasks if task.change]
        experts = [view for layer in self.teacher_experts for views in layer.tensors for view in views]
        theirs = [source.view for task in changing for source in task.sources]
        return theirs + (experts if changing else []), [task.view for task in changing]

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


def map_depth(depth_map: str | Sequence[float], student_layers: int, teacher_layers: int) -> tuple[Layers, ...]:
    """The teacher layers behind every student layer: one or two, with weights that sum to 1.

    Args:
        depth_map: ``linear``, ``endpoints``, ``tanh`` (see ``algebra.interpolation``) or one teacher position a layer.
        student_layers: Decoder layers of the student.
        teacher_layers: Decoder layers of the teacher.

    Raises:
        UsageError: An explicit list of the wrong length, or a position outside the teacher.
    """
    from moe_svd_distill.algebra.interpolation import endpoint_depth, linear_depth, tanh_depth

    named = {"linear": linear_depth, "endpoints": endpoint_depth, "tanh": tanh_depth}
    if isinstance(depth_map, str):
        steps = named[depth_map](student_layers, teacher_layers)
        return tuple(_blend(*step) for step in steps)
    if len(depth_map) != student_layers:
        raise UsageError(
            f"depth_map lists {len(depth_map)} positions, expected {student_layers}, one for each student layer",
            "Correct depth_map",
        )
    for layer, position in enumerate(depth_map):
        if not 0 <= position <= teacher_layers - 1:
            raise UsageError(
                f"depth_map sends student layer {layer} to teacher layer {position:g}, expected 0 to "
                f"{teacher_layers - 1}",
                "Correct depth_map",
            )
    return tuple(
        _blend(int(position), min(int(position) + 1, teacher_layers - 1), position - int(position))
        for position in depth_map
    )


def _blend(lower: int, upper: int, weight: float) -> Layers:
    if lower == upper or weight == 0.0:
        return ((lower, 1.0),)
    return ((upper, 1.0),) if weight == 1.0 else ((lower, 1.0 - weight), (upper, weight))
