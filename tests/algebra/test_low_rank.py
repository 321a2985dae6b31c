"""Fast truncated SVD against the plain formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.truncated_svd import bulk, power_law
from moe_svd_distill.algebra import low_rank
from moe_svd_distill.algebra.low_rank import batched_truncated_svd, low_rank_of_blocks, rank_for_energy, truncated_svd
from tests.algebra.plain import plain_truncated_svd


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def excess(matrix: Tensor, left: Tensor, right: Tensor, rank: int) -> float:
    """Residual over the Eckart-Young optimum, both in float64."""
    D = matrix.double()
    missed = float((D - left.double() @ right.double()).square().sum())
    return math.sqrt(missed / float(torch.linalg.svdvals(D)[rank:].square().sum()))


SPECTRA = {
    "bulk": lambda m, n: bulk(m, n, seeded()),
    "weak bulk": lambda m, n: bulk(m, n, seeded(), strength=1.0),
    "noise": lambda m, n: torch.randn(m, n, generator=seeded()) * 0.02,
    "pow0.2": lambda m, n: power_law(m, n, 0.2, seeded()),
    "pow0.5": lambda m, n: power_law(m, n, 0.5, seeded()),
    "pow1": lambda m, n: power_law(m, n, 1.0, seeded()),
    "uniform": lambda m, n: torch.rand(m, n, generator=seeded()),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("m", "n", "rank"), [(384, 640, 8), (640, 384, 48), (512, 512, 64), (300, 2000, 32)])
def test_residual_is_close_to_the_optimum(name: str, m: int, n: int, rank: int) -> None:
    matrix = SPECTRA[name](m, n)
    result = truncated_svd(matrix, rank, generator=seeded(1))
    assert excess(matrix, result.left, result.right, rank) < 1.0015
    assert result.left.shape == (m, rank)
    assert result.right.shape == (rank, n)


@pytest.mark.parametrize("rank", [16, 64, 128])
def test_promised_quality_at_real_sizes(rank: int) -> None:
    matrix = bulk(768, 2048, seeded())
    result = truncated_svd(matrix, rank, generator=seeded(1))
    assert excess(matrix, result.left, result.right, rank) < 1.001


@pytest.mark.parametrize("rank", [4, 40, 150])
def test_reported_figures_are_the_true_ones(rank: int) -> None:
    matrix = power_law(320, 500, 0.5, seeded())
    result = truncated_svd(matrix, rank, generator=seeded(1))
    D = matrix.double()
    product = result.left.double() @ result.right.double()
    residual = float((D - product).norm() / D.norm())
    assert result.residual == pytest.approx(residual, rel=1e-4)
    assert result.energy == pytest.approx(1 - residual**2, abs=1e-5)
    exact = plain_truncated_svd(matrix, rank).singular_values[:4].float()
    torch.testing.assert_close(torch.linalg.svdvals(product)[:4].float(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("decay", [0.05, 0.2, 1.0])
def test_steep_spectra_keep_their_digits(decay: float) -> None:
    m, n, rank = 300, 400, 48
    left = torch.linalg.qr(torch.randn(m, m, generator=seeded(), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, m, generator=seeded(1), dtype=torch.float64))[0]
    matrix = ((left * torch.exp(-decay * torch.arange(m))) @ right.T).float()
    result = truncated_svd(matrix, rank, generator=seeded())
    D = matrix.double()
    residual = float((D - result.left.double() @ result.right.double()).norm() / D.norm())
    optimum = float(torch.linalg.svdvals(D)[rank:].norm() / D.norm())
    assert residual < 1.001 * optimum + 1e-6
    assert result.residual == pytest.approx(residual, rel=0.05, abs=1e-7)


@pytest.mark.parametrize("true_rank", [1, 5, 16])
def test_a_matrix_of_low_rank_is_reproduced(true_rank: int) -> None:
    matrix = torch.randn(260, true_rank, generator=seeded()) @ torch.randn(true_rank, 300, generator=seeded(1))
    result = truncated_svd(matrix, 16, generator=seeded())
    assert result.residual < 1e-6
    torch.testing.assert_close(result.left @ result.right, matrix, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("m", "n", "rank"), [(20, 30, 20), (30, 20, 20), (20, 30, 64), (30, 20, 33), (1, 5, 3)])
def test_full_rank_is_exact_even_after_rounding(m: int, n: int, rank: int) -> None:
    matrix = torch.randn(m, n, generator=seeded()).bfloat16()
    result = truncated_svd(matrix, rank, generator=seeded())
    assert (result.left.shape, result.right.shape) == ((m, rank), (rank, n))
    assert torch.equal((result.left.bfloat16() @ result.right.bfloat16()).float(), matrix.float())
    assert (result.residual, result.energy, result.method) == (0.0, 1.0, "exact")


@pytest.mark.parametrize("shape", [(8, 6), (300, 400)])
def test_a_zero_matrix_gives_zeros(shape: tuple[int, int]) -> None:
    result = truncated_svd(torch.zeros(shape), 4, generator=seeded())
    assert not result.left.any()
    assert not result.right.any()
    assert (result.residual, result.energy) == (0.0, 1.0)


def test_the_factors_share_the_singular_values_evenly() -> None:
    result = truncated_svd(bulk(256, 320, seeded()), 12, generator=seeded())
    columns, rows = result.left.norm(dim=0), result.right.norm(dim=1)
    torch.testing.assert_close(columns, rows, rtol=2e-3, atol=0)
    sigma = torch.linalg.svdvals(result.left @ result.right)[:12]
    torch.testing.assert_close(columns * rows, sigma, rtol=2e-3, atol=0)
    assert bool(((columns * rows).diff() <= 1e-4).all())


def test_the_same_seed_gives_the_same_factors_with_fixed_signs() -> None:
    matrix = bulk(256, 320, seeded())
    first, second = (truncated_svd(matrix, 12, generator=seeded(5)) for _ in range(2))
    assert torch.equal(first.left, second.left)
    largest = first.left.gather(0, first.left.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_entries_that_are_not_finite_are_refused(value: float) -> None:
    matrix = torch.ones(6, 5)
    matrix[2, 3] = value
    with pytest.raises(ValueError, match="finite"):
        truncated_svd(matrix, 2, generator=seeded())


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="rank"):
        truncated_svd(torch.ones(3, 3), 0, generator=seeded())
    with pytest.raises(ValueError, match="empty"):
        truncated_svd(torch.ones(0, 3), 1, generator=seeded())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_very_small_and_very_large_entries(scale: float) -> None:
    matrix = bulk(256, 320, seeded())
    plain, scaled = (truncated_svd(matrix * factor, 16, generator=seeded()) for factor in (1.0, scale))
    torch.testing.assert_close(scaled.left @ scaled.right / scale, plain.left @ plain.right, rtol=1e-2, atol=1e-3)
    assert scaled.residual == pytest.approx(plain.residual, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_type_is_accepted(dtype: torch.dtype) -> None:
    matrix = bulk(220, 260, seeded()).to(dtype)
    result = truncated_svd(matrix, 16, generator=seeded())
    assert result.left.dtype == torch.float32
    assert excess(matrix, result.left, result.right, 16) < 1.001


@pytest.mark.parametrize(("m", "n"), [(224, 288), (288, 224)])
def test_low_precision_passes(m: int, n: int) -> None:
    matrix = bulk(m, n, seeded())
    result = truncated_svd(matrix, 12, generator=seeded(), pass_dtype=torch.bfloat16)
    assert result.method == "subspace"
    assert excess(matrix, result.left, result.right, 12) < 1.002


def test_a_stack_is_factored_like_its_members() -> None:
    stack = torch.stack([bulk(220, 260, seeded(seed)) for seed in range(3)])
    stack[1] = 0
    results = batched_truncated_svd(stack, 16, generator=seeded())
    assert len(results) == 3
    assert results[1].energy == 1.0
    for matrix, result in zip(stack[::2], results[::2], strict=True):
        assert excess(matrix, result.left, result.right, 16) < 1.001


@pytest.mark.parametrize("pass_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "rank"), [(220, 260, 16), (260, 220, 16), (220, 260, 100), (20, 30, 40)])
def test_the_batched_kernels_do_the_same(m: int, n: int, rank: int, pass_dtype: torch.dtype) -> None:
    stack = torch.stack([bulk(m, n, seeded(seed)) for seed in range(3)])
    stack[1] = 0
    results = low_rank._factorise(stack, rank, seeded(), pass_dtype)
    for matrix, result in zip(stack, results, strict=True):
        reference = plain_truncated_svd(matrix, rank)
        assert result.left.shape == (m, rank)
        assert result.residual <= 1.002 * reference.residual + 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pass_dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(pass_dtype: torch.dtype) -> None:
    stack = torch.stack([bulk(256, 512, seeded(seed)) for seed in range(4)])
    results = batched_truncated_svd(stack.cuda(), 16, generator=seeded(), pass_dtype=pass_dtype)
    for matrix, result in zip(stack, results, strict=True):
        assert excess(matrix, result.left.cpu(), result.right.cpu(), 16) < 1.002


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), rank=st.integers(1, 50), seed=st.integers(0, 1000))
def test_any_shape_and_rank_is_optimal(m: int, n: int, rank: int, seed: int) -> None:
    matrix = torch.randn(m, n, generator=seeded(seed))
    result = truncated_svd(matrix, rank, generator=seeded(seed))
    assert result.left.shape == (m, rank)
    assert result.right.shape == (rank, n)
    assert result.residual == pytest.approx(plain_truncated_svd(matrix, rank).residual, abs=1e-4)


def test_rank_for_energy() -> None:
    values = torch.tensor([3.0, 2.0, 1.0])
    total = 9.0 + 4.0 + 1.0
    assert rank_for_energy(values, 0.5, total) == 1
    assert rank_for_energy(values, 13 / 14, total) == 2
    assert rank_for_energy(values, 1.0, total) == 3
    assert rank_for_energy(values, 1.0, 2 * total) == 3
    assert rank_for_energy(values, 0.0, total) == 1
    with pytest.raises(ValueError, match="energy"):
        rank_for_energy(values, 1.5, total)
    with pytest.raises(ValueError, match="total"):
        rank_for_energy(values, 0.5, -1.0)


def matrix(rows: int = 200, columns: int = 24) -> torch.Tensor:
    gaussian = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    return gaussian * torch.linspace(1.0, 0.01, columns)


@pytest.mark.parametrize("rank", [1, 5, 23, 24, 30])
def test_it_equals_the_exact_truncation(rank: int) -> None:
    whole = matrix()
    found, norm, _ = low_rank_of_blocks(lambda: whole.split(37), 200, 24, rank)
    expected = plain_truncated_svd(whole, rank)
    assert found.left.shape == (200, rank)
    assert found.right.shape == (rank, 24)
    assert torch.allclose(found.left @ found.right, expected.product.float(), atol=1e-4)
    assert found.residual == pytest.approx(expected.residual, abs=1e-5)
    assert norm == pytest.approx(float(torch.linalg.vector_norm(whole)), rel=1e-6)


def test_a_zero_matrix_has_zero_factors() -> None:
    found, norm, _ = low_rank_of_blocks(lambda: [torch.zeros(5, 4)], 5, 4, 2)
    assert (norm, found.residual) == (0.0, 0.0)
    assert not found.left.any()


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="rank"):
        low_rank_of_blocks(lambda: [torch.zeros(5, 4)], 5, 4, 0)
