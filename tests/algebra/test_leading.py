"""The several ways to leading singular vectors, and the choice among them."""

import pytest
import torch
from torch import Tensor

from benchmarks.truncated_svd import bulk
from moe_svd_distill.algebra.dtypes import matmul_dtype
from moe_svd_distill.algebra.leading import cheapest_method, krylov_factors
from moe_svd_distill.algebra.subspace import (
    cholesky_qr,
    gram_factors,
    momentum_factors,
    orthonormal_rows,
    row_gram,
    steep_factors,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def share_of_optimum(matrix: Tensor, U: Tensor, W: Tensor) -> float:
    """Captured energy over the best possible, from what U alone spans."""
    rank = U.shape[-2]
    Q = torch.linalg.qr(U.double().mT)[0]
    captured = (Q.mT @ matrix.double()).square().sum()
    return float(captured / torch.linalg.svdvals(matrix.double())[:rank].square().sum())


@pytest.mark.parametrize(
    ("m", "n", "rank", "way"),
    [
        (128, 4096, 16, "eigh"),
        (768, 2048, 16, "krylov"),
        (768, 2048, 64, "krylov"),
        (768, 2048, 128, "gram-krylov"),
        (768, 2048, 256, "eigh"),
        (2048, 2048, 256, "krylov"),
        (2048, 2048, 1024, "eigh"),
    ],
)
def test_the_cheapest_way_in_float32(m: int, n: int, rank: int, way: str) -> None:
    assert cheapest_method(m, n, rank, torch.float32) == way
    assert cheapest_method(n, m, rank, torch.float32) == way


def test_the_cheapest_way_in_low_precision() -> None:
    assert cheapest_method(2048, 2048, 256, torch.bfloat16) == "momentum"
    assert cheapest_method(768, 2048, 256, torch.bfloat16) == "eigh"


@pytest.mark.parametrize("by_gram", [False, True])
@pytest.mark.parametrize("upright", [False, True])
def test_krylov_space_of_a_stack(by_gram: bool, upright: bool) -> None:
    stack = torch.stack([bulk(240, 300, seeded(seed)) for seed in range(3)])
    if upright:
        stack = stack.mT.contiguous().mT
    energy = stack.double().square().sum(dim=(-2, -1))
    U, W = krylov_factors(stack, 24, energy=energy, generator=seeded(), by_gram=by_gram)
    for matrix, rows, image in zip(stack, U, W, strict=True):
        assert share_of_optimum(matrix, rows, image) > 0.98
        torch.testing.assert_close(rows @ matrix, image, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(rows @ rows.T, torch.eye(24), rtol=0, atol=5e-3)


def test_krylov_gives_way_to_the_whole_decomposition() -> None:
    matrix = torch.randn(200, 220, generator=seeded())
    energy = matrix.double().square().sum()
    U, W = krylov_factors(matrix, 120, energy=energy, generator=seeded())
    assert share_of_optimum(matrix, U, W) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("pass_dtype", [torch.float32, torch.bfloat16])
def test_momentum_on_a_stack(pass_dtype: torch.dtype) -> None:
    stack = torch.stack([bulk(200, 240, seeded(seed)) for seed in range(2)])
    U, W = momentum_factors(stack, 17, generator=seeded(), pass_dtype=pass_dtype)
    for matrix, rows, image in zip(stack, U, W, strict=True):
        assert share_of_optimum(matrix, rows, image) > 0.985


def test_momentum_beats_plain_iteration_on_a_flat_spectrum() -> None:
    matrix = torch.randn(300, 400, generator=seeded())
    U, W = momentum_factors(matrix, 40, generator=seeded(), pass_dtype=torch.float32)
    Q = torch.linalg.qr(matrix @ torch.randn(400, 56, generator=seeded()))[0]
    for _ in range(5):
        Q = torch.linalg.qr(matrix @ (matrix.T @ Q))[0]
    plain = torch.linalg.svdvals((Q.T @ matrix).double())[:40].square().sum()
    best = torch.linalg.svdvals(matrix.double())[:40].square().sum()
    assert share_of_optimum(matrix, U, W) > float(plain / best)


def test_gram_factors_are_singular_vectors() -> None:
    matrix = torch.randn(60, 90, generator=seeded())
    U, W = gram_factors(matrix, 10)
    values = torch.linalg.svdvals(matrix.double())[:10]
    torch.testing.assert_close(W.norm(dim=1).double(), values, rtol=1e-4, atol=0)
    torch.testing.assert_close(U @ U.T, torch.eye(10), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (300, 64), (2, 301, 40)])
def test_row_gram_is_the_product(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=seeded())
    torch.testing.assert_close(row_gram(matrix), matrix @ matrix.mT, rtol=1e-5, atol=1e-4)


def test_cholesky_qr() -> None:
    rows = torch.randn(3, 20, 200, generator=seeded()) * torch.logspace(-3, 3, 20)[:, None]
    Q, R = cholesky_qr(rows)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(20).expand(3, -1, -1), rtol=0, atol=1e-4)
    torch.testing.assert_close(R.mT @ Q, rows, rtol=1e-3, atol=1e-3)
    assert torch.equal(R, R.triu())


def test_dependent_and_zero_rows_do_no_harm() -> None:
    rows = torch.randn(4, 50, generator=seeded())
    rows[1], rows[2] = rows[0], 0.0
    Q = orthonormal_rows(rows)
    assert bool(torch.isfinite(Q).all())
    assert not Q[2].any()


def test_steep_factors_are_singular_vectors() -> None:
    matrix = torch.randn(90, 12, generator=seeded()) @ torch.randn(12, 70, generator=seeded(1))
    U, W = steep_factors(matrix, 12, generator=seeded())
    torch.testing.assert_close(U.T @ W, matrix, rtol=0, atol=1e-4)


def test_matmul_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matmul_dtype(torch.device("cuda")) == torch.bfloat16
    assert matmul_dtype(torch.device("mps")) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert matmul_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert matmul_dtype(torch.device("cpu")) == torch.bfloat16
