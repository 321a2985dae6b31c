"""Which teacher layers stand behind each student layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_svd_distill.errors import UsageError


@dataclass(frozen=True)
class LayerBlend:
    """The teacher layers behind one student layer.

    Attributes:
        student: Student layer.
        teacher: One or two (teacher layer, weight) pairs; the weights sum to 1.
    """

    student: int
    teacher: tuple[tuple[int, float], ...]


def map_depth(depth_map: str | Sequence[float], student_layers: int, teacher_layers: int) -> tuple[LayerBlend, ...]:
    """Map every student layer onto the teacher's depth.

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
        return tuple(_blend(layer, *step) for layer, step in enumerate(steps))
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
        _blend(layer, int(position), min(int(position) + 1, teacher_layers - 1), position - int(position))
        for layer, position in enumerate(depth_map)
    )


def _blend(layer: int, lower: int, upper: int, weight: float) -> LayerBlend:
    if lower == upper or weight == 0.0:
        return LayerBlend(layer, ((lower, 1.0),))
    if weight == 1.0:
        return LayerBlend(layer, ((upper, 1.0),))
    return LayerBlend(layer, ((lower, 1.0 - weight), (upper, weight)))
