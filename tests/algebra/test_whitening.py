"""Roots of a second moment, truncation in its metric, and gradients through what follows a head."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_svd_distill.algebra.divergence import LogitTransform
from moe_svd_distill.algebra.whitening import Whitening, truncated_in_metric, whitening

SEEDS = st.integers(0, 2**31)
WIDTHS = st.integers(1, 24)


def _inputs(generator: torch.Generator, count: int, width: int, decades: float) -> Tensor:
    """Correlated inputs whose directions have sizes over some decades."""
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    sizes = torch.logspace(0, -decades, width, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * sizes @ mixing


def _moment(seed: int, width: int, decades: float) -> tuple[torch.Generator, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = _inputs(generator, 4 * width, width, decades)
    return generator, inputs.T @ inputs / len(inputs)


@given(SEEDS, WIDTHS, st.floats(0.0, 3.0), st.floats(0.01, 100.0))
@settings(max_examples=40, deadline=None)
def test_root_times_inverse_is_the_identity(seed: int, width: int, decades: float, size: float) -> None:
    _, moment = _moment(seed, width, decades)
    metric = whitening((moment * size).float())
    for product in (metric.root @ metric.inverse, metric.inverse @ metric.root):
        torch.testing.assert_close(product, torch.eye(width), rtol=0, atol=2e-4)
    torch.testing.assert_close(metric.root, metric.root.T, rtol=1e-5, atol=1e-5 * size**0.5)


@given(SEEDS, WIDTHS, st.floats(0.0, 3.0), st.sampled_from([1e-3, 0.1]))
@settings(max_examples=40, deadline=None)
def test_the_root_squared_is_the_moment_with_its_ridge(seed: int, width: int, decades: float, ridge: float) -> None:
    _, moment = _moment(seed, width, decades)
    root = whitening(moment.float(), ridge).root.double()
    wanted = moment + ridge * moment.diagonal().mean() * torch.eye(width)
    torch.testing.assert_close(root @ root, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def test_a_moment_that_is_not_quite_symmetric_or_of_low_rank_still_has_roots() -> None:
    vector = torch.randn(8, generator=torch.Generator().manual_seed(0))
    moment = torch.outer(vector, vector)
    moment[0, 1] += 1e-6
    metric = whitening(moment)
    assert torch.isfinite(metric.inverse).all()
    torch.testing.assert_close(metric.root @ metric.inverse, torch.eye(8), rtol=0, atol=1e-4)


def _best_error(delta: Tensor, metric: Whitening, rank: int) -> float:
    """The least error that any map of this rank has in the metric (Eckart-Young), in float64."""
    values = np.linalg.svd((delta.double() @ metric.root.double()).numpy(), compute_uv=False)
    return float((values[rank:] ** 2).sum())


@given(SEEDS, st.integers(1, 40), st.integers(1, 20), st.integers(1, 24), st.floats(0.0, 2.0))
@settings(max_examples=60, deadline=None)
def test_truncation_is_optimal_in_the_metric(seed: int, rows: int, width: int, rank: int, decades: float) -> None:
    rank = min(rank, rows, width)
    generator, moment = _moment(seed, width, decades)
    metric = whitening(moment.float())
    delta = torch.randn(rows, width, generator=generator)
    b, a = truncated_in_metric(delta, metric, rank)
    assert b.shape == (rows, rank)
    assert a.shape == (rank, width)
    remainder = (delta.double() - b.double() @ a.double()) @ metric.root.double()
    whole = float((delta.double() @ metric.root.double()).square().sum())
    found, best = float(remainder.square().sum()), _best_error(delta, metric, rank)
    assert best - 1e-9 * whole <= found <= best + 1e-6 * whole


def test_the_metric_matters_and_the_reduced_inputs_have_unit_moment() -> None:
    generator, moment = _moment(3, 16, 2.0)
    metric = whitening(moment.float())
    delta = torch.randn(30, 16, generator=generator)
    b, a = truncated_in_metric(delta, metric, 4)
    plain_u, plain_s, plain_v = torch.linalg.svd(delta, full_matrices=False)
    plain = plain_u[:, :4] * plain_s[:4] @ plain_v[:4]
    error, other = (((delta - product) @ metric.root).square().sum() for product in (b @ a, plain))
    assert error < 0.9 * other
    reduced = a.double() @ metric.root.double()
    torch.testing.assert_close(reduced @ reduced.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-4)


@given(SEEDS, st.sampled_from([None, 0.5, 3.0, 30.0]), st.sampled_from([1.0, 0.25, 4.0]))
@settings(max_examples=40, deadline=None)
def test_pull_back_is_what_autograd_says(seed: int, cap: float | None, multiplier: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    transform = LogitTransform(multiplier, cap)
    output = torch.randn(5, 7, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()
    logits = transform(output)
    gradient = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(logits, output, gradient)
    torch.testing.assert_close(transform.pull_back(gradient, logits.detach()), wanted, rtol=1e-9, atol=1e-12)


def test_the_transform_is_capped_and_multiplied() -> None:
    output = torch.tensor([[-1e6, -0.5, 0.0, 0.5, 1e6]])
    assert LogitTransform()(output) is output
    torch.testing.assert_close(LogitTransform(2.0)(output), 2 * output)
    capped = LogitTransform(2.0, 30.0)(output)
    torch.testing.assert_close(capped[0, [0, 4]], torch.tensor([-30.0, 30.0]))
    torch.testing.assert_close(capped[0, 3], 30 * torch.tanh(torch.tensor(1.0 / 30)))
