"""Interpolation of tensors and the maps of depth."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_svd_distill.algebra.interpolation import (
    endpoint_depth,
    linear,
    linear_depth,
    spherical,
    tanh_depth,
)


def position(entry: tuple[int, int, float]) -> float:
    floor, ceil, weight = entry
    return floor + weight * (ceil - floor)


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 7, generator=generator), 3 * torch.randn(5, 7, generator=generator)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_linear_is_the_plain_formula(weight: float) -> None:
    a, b = pair()
    torch.testing.assert_close(linear(a, b, weight), (1 - weight) * a + weight * b)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_spherical_is_the_plain_formula(weight: float) -> None:
    a, b = (tensor.double() for tensor in pair())
    theta = math.acos(float((a * b).sum() / a.norm() / b.norm()))
    norm = (1 - weight) * a.norm() + weight * b.norm()
    unit = (math.sin((1 - weight) * theta) * a / a.norm() + math.sin(weight * theta) * b / b.norm()) / math.sin(theta)
    torch.testing.assert_close(spherical(a, b, weight), norm * unit)


def test_spherical_keeps_the_norm_where_linear_shrinks_it() -> None:
    a, b = pair()
    b = b * a.norm() / b.norm()
    middle = spherical(a, b, 0.5)
    torch.testing.assert_close(middle.norm(), a.norm())
    assert linear(a, b, 0.5).norm() < 0.9 * a.norm()


@pytest.mark.parametrize("factor", [1.0, 2.0, 1.0 + 1e-7, -1.0, 0.0])
def test_spherical_of_parallel_opposite_or_zero_tensors_is_linear(factor: float) -> None:
    a, _ = pair()
    torch.testing.assert_close(spherical(a, factor * a, 0.3), linear(a, factor * a, 0.3))


def test_low_precision_is_interpolated_in_float32() -> None:
    a, b = (tensor.bfloat16() for tensor in pair())
    assert linear(a, b, 0.5).dtype == torch.float32
    assert spherical(a, b, 0.5).dtype == torch.float32


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_weights_outside_the_unit_interval_are_refused(weight: float) -> None:
    for interpolate in (linear, spherical):
        with pytest.raises(ValueError, match="weight"):
            interpolate(*pair(), weight)


def test_linear_depth_is_layer_times_the_ratio() -> None:
    assert linear_depth(46, 92) == [(2 * layer, 2 * layer, 0.0) for layer in range(46)]
    assert [position(entry) for entry in linear_depth(3, 5)] == pytest.approx([0, 5 / 3, 10 / 3])
    assert linear_depth(3, 5)[1][:2] == (1, 2)
    assert [position(entry) for entry in linear_depth(6, 3)] == pytest.approx([0, 0.5, 1, 1.5, 2, 2])


def test_endpoint_depth_maps_first_to_first_and_last_to_last() -> None:
    assert [position(entry) for entry in endpoint_depth(3, 5)] == [0, 2, 4]
    assert position(endpoint_depth(48, 62)[-1]) == 61
    assert position(endpoint_depth(1, 5)[0]) == 2


def test_tanh_depth_saturates_as_the_newer_generation_does() -> None:
    places = [position(entry) for entry in tanh_depth(46, 92)]
    assert round(places[0], 1) == 0.0
    assert round(places[14], 1) == 0.6
    assert round(places[31], 1) == 90.4
    assert round(places[45], 1) == 91.0
    assert all(low + high == pytest.approx(91) for low, high in zip(places, reversed(places), strict=True))


@settings(deadline=None)
@given(student=st.integers(1, 100), teacher=st.integers(1, 100))
def test_every_depth_map_stays_within_the_teacher_and_never_turns_back(student: int, teacher: int) -> None:
    for depth_map in (linear_depth, tanh_depth, endpoint_depth):
        entries = depth_map(student, teacher)
        assert len(entries) == student
        for floor, ceil, weight in entries:
            assert 0 <= floor <= ceil <= teacher - 1
            assert ceil - floor <= 1
            assert 0 <= weight < 1
            assert weight > 0 or floor == ceil
        places = [position(entry) for entry in entries]
        assert places == sorted(places)


def test_layer_counts_below_one_are_refused() -> None:
    for depth_map in (linear_depth, tanh_depth, endpoint_depth):
        with pytest.raises(ValueError, match="layer counts"):
            depth_map(0, 3)
