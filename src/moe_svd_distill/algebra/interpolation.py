"""Depth: which teacher layers a student layer corresponds to, and how two of their tensors are mixed."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

STEEPNESS = 0.15  # of the tanh in `tanh_depth`
PARALLEL = 1.0 - 1e-6  # |cosine| above which spherical interpolation is replaced by the linear one


def linear(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], weight: float) -> Float[Tensor, "*shape"]:
    """``(1 - weight) a + weight b`` in float32 (float64 if given)."""
    check_weight(weight)
    return torch.lerp(working(a), working(b), weight)


def spherical(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], weight: float) -> Float[Tensor, "*shape"]:
    """Along the great circle between the directions of the two flattened tensors; the norm goes linearly.

    ``theta`` the angle, ``N = (1 - w)|a| + w|b|``:
    ``N (sin((1 - w) theta) / sin(theta) a/|a| + sin(w theta) / sin(theta) b/|b|)`` (Shoemake 1985).
    Linear where the tensors are parallel, opposite or zero, since no great circle is singled out there.
    """
    check_weight(weight)
    first, second = working(a), working(b)
    norms = torch.stack([torch.linalg.vector_norm(first), torch.linalg.vector_norm(second)]).double()
    inner = torch.dot(first.flatten(), second.flatten()).double()
    left, right = spherical_coefficients(norms[0], norms[1], inner, weight)
    return float(left) * first + float(right) * second


def spherical_coefficients(
    norm_a: Float[Tensor, "*experts"],
    norm_b: Float[Tensor, "*experts"],
    inner: Float[Tensor, "*experts"],
    weight: float,
) -> tuple[Float[Tensor, "*experts"], Float[Tensor, "*experts"]]:
    """Factors of ``a`` and ``b`` in their spherical interpolation, from their norms and inner product alone."""
    product = norm_a * norm_b
    cosine = torch.where(product > 0, inner / product.clamp_min(torch.finfo(product.dtype).tiny), 1.0).clamp(-1.0, 1.0)
    straight = cosine.abs() > PARALLEL
    theta = torch.acos(torch.where(straight, torch.zeros_like(cosine), cosine))
    sine = torch.where(straight, torch.ones_like(theta), torch.sin(theta))
    norm = torch.lerp(norm_a, norm_b, weight)
    left = norm * torch.sin((1.0 - weight) * theta) / (sine * torch.where(straight, torch.ones_like(norm_a), norm_a))
    right = norm * torch.sin(weight * theta) / (sine * torch.where(straight, torch.ones_like(norm_b), norm_b))
    return (
        torch.where(straight, torch.full_like(left, 1.0 - weight), left),
        torch.where(straight, torch.full_like(right, weight), right),
    )


def linear_depth(student_layers: int, teacher_layers: int) -> list[tuple[int, int, float]]:
    """For every student layer (floor, ceil, weight of ceil) of ``layer * T / S``, kept within the teacher."""
    _check_layers(student_layers, teacher_layers)
    return [_neighbours(layer * teacher_layers / student_layers, teacher_layers) for layer in range(student_layers)]


def endpoint_depth(student_layers: int, teacher_layers: int) -> list[tuple[int, int, float]]:
    """As ``linear_depth`` with ``layer * (T - 1) / (S - 1)``: first to first and last to last."""
    _check_layers(student_layers, teacher_layers)
    if student_layers == 1:
        return [_neighbours((teacher_layers - 1) / 2, teacher_layers)]
    step = (teacher_layers - 1) / (student_layers - 1)
    return [_neighbours(layer * step, teacher_layers) for layer in range(student_layers)]


def tanh_depth(student_layers: int, teacher_layers: int) -> list[tuple[int, int, float]]:
    """As ``linear_depth`` with a tanh that is symmetric about the middle: many student layers at both ends.

    ``(T - 1)/2 (1 + tanh(k T/S x) / tanh(k T/S x_last))`` with ``x = layer - (S - 1)/2``. It saturates: for 46 student
    and 92 teacher layers, layers 0-14 map to 0-0.6 and 31-45 to 90.4-91. Kept for comparison with the newer generation
    of the public scripts.

    Raises:
        ValueError: fewer than one layer.
    """
    _check_layers(student_layers, teacher_layers)
    half = (teacher_layers - 1) / 2
    if student_layers == 1:
        return [_neighbours(half, teacher_layers)]
    slope = STEEPNESS * teacher_layers / student_layers
    middle = (student_layers - 1) / 2
    end = math.tanh(slope * middle)
    return [
        _neighbours(half * (1.0 + math.tanh(slope * (layer - middle)) / end), teacher_layers)
        for layer in range(student_layers)
    ]


def check_weight(weight: float) -> None:
    """Raises ValueError unless ``weight`` lies in [0, 1]."""
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight must lie in [0, 1], not {weight}")


def working(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """float64 as it is, every other type in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _neighbours(position: float, teacher_layers: int) -> tuple[int, int, float]:
    last = teacher_layers - 1
    inside = min(max(position, 0.0), float(last))
    nearest = round(inside)
    if abs(inside - nearest) < 1e-9:
        return nearest, nearest, 0.0
    floor = math.floor(inside)
    return floor, floor + 1, inside - floor


def _check_layers(student_layers: int, teacher_layers: int) -> None:
    if student_layers < 1 or teacher_layers < 1:
        raise ValueError(f"layer counts must be at least 1, not {student_layers} and {teacher_layers}")
