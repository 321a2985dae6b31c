"""FP8: scales per block, per row and per tensor, ragged blocks included."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_svd_distill.checkpoints.quantisation.coded import fit_grid
from tests.support.quantisers import QWEN3_FP8, expand, float8_blocks, opened, same, seeded
from tests.support.refusals import refusal

NAME = "model.layers.0.mlp.up_proj.weight"
sides = st.integers(1, 40)


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded()).to(torch.float8_e4m3fn)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 24), st.integers(1, 24), st.integers(0, 39), st.integers(0, 39))
def test_blocks_of_any_size_on_any_shape(rows: int, columns: int, high: int, wide: int, a: int, b: int) -> None:
    codes = random_codes(rows, columns)
    scale = torch.rand(-(-rows // high), -(-columns // wide), generator=seeded(1)) + 0.01
    expected = codes.double() * expand(scale.double(), (rows, columns), (high, wide))
    config = QWEN3_FP8 | {"weight_block_size": [high, wide]}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = opened(Path(folder), {NAME: codes, f"{NAME}_scale_inv": scale}, config)
        assert checkpoint[NAME].shape == (rows, columns)
        same(checkpoint.read(NAME), expected)
        begin, end = sorted((a, b))
        same(checkpoint.read_rows(NAME, begin, end), expected[begin:end])
        checkpoint.close()


@pytest.mark.parametrize("rows", [128, 192, 576, 600])
def test_the_last_block_may_be_ragged_and_the_grid_does_not_say_its_size(rows: int, tmp_path: Path) -> None:
    from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer

    weight = torch.randn(rows, 160, generator=seeded()) * torch.linspace(0.1, 5, rows)[:, None]
    codes, scale = float8_blocks(weight, (128, 128))
    checkpoint = opened(tmp_path, {NAME: codes, f"{NAME}_scale_inv": scale}, QWEN3_FP8)
    read = checkpoint.read(NAME)
    same(read, codes.double() * expand(scale.double(), (rows, 160), (128, 128)))
    library = FP8BlockDequantizer(targets=["Linear"], weight_block_size=(128, 128))
    assert torch.equal(read, library.process({NAME: codes.clone(), f"{NAME}_scale_inv": scale.clone()})[NAME])
    assert float((read.float() - weight).norm() / weight.norm()) < 0.04
    if rows == 192:  # two blocks of 96 rows would have the same grid
        wrong = codes.float() * expand(scale, (rows, 160), (96, 80))
        assert float((wrong - weight).norm() / weight.norm()) > 0.1


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24,), (24, 1)])
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_a_scale_per_tensor_or_per_row(shape: tuple[int, ...], suffix: str, tmp_path: Path) -> None:
    codes, scale = random_codes(24, 40), torch.rand(shape, generator=seeded(1)) + 0.1
    tensors = {NAME: codes, NAME + suffix: scale, NAME.replace("weight", "input_scale"): torch.ones(())}
    method = {"quant_method": "fp8", "activation_scheme": "static"}
    if shape == (24, 1):
        method = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    checkpoint = opened(tmp_path, tensors, method)
    same(checkpoint.read(NAME), codes.double() * scale.double().reshape(-1, 1))
    assert list(checkpoint) == [NAME]


def test_experts_of_three_dimensions(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes, scale = random_codes(3, 40, 24), torch.rand(3, 3, 2, generator=seeded(1))
    config = QWEN3_FP8 | {"weight_block_size": [16, 16]}
    tensors = {name: codes, f"{name}_scale_inv": scale, f"{name}_activation_scale": torch.ones(3)}
    checkpoint = opened(tmp_path, tensors, config)
    expected = codes.double() * expand(scale.double(), (3, 40, 24), (1, 16, 16))
    same(checkpoint.read(name), expected)
    same(checkpoint.read_rows(name, 1, 3), expected[1:])


def test_powers_of_two_as_scales(tmp_path: Path) -> None:
    codes, exponents = random_codes(8, 8), torch.tensor([[120, 127]], dtype=torch.uint8)
    scale = exponents.view(torch.float8_e8m0fnu)
    config = QWEN3_FP8 | {"weight_block_size": [8, 4]}
    checkpoint = opened(tmp_path, {NAME: codes, f"{NAME}_scale_inv": scale}, config)
    same(checkpoint.read(NAME), codes.double() * expand(2.0 ** (exponents.double() - 127), (8, 8), (8, 4)))


@pytest.mark.parametrize(
    ("named", "dtype"),
    [({"dtype": "float16"}, torch.float16), ({"torch_dtype": "float32"}, torch.float32), ({"dtype": "auto"}, None)],
)
def test_the_dtype_of_the_model(named: dict[str, Any], dtype: torch.dtype | None, tmp_path: Path) -> None:
    named = {"dtype": None} | named
    checkpoint = opened(tmp_path, {NAME: random_codes(8, 8), f"{NAME}_scale": torch.ones(())}, QWEN3_FP8, **named)
    assert checkpoint.read(NAME).dtype == (dtype or torch.bfloat16)


def test_nan_stays_nan(tmp_path: Path) -> None:
    codes = torch.full((2, 2), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert opened(tmp_path, {NAME: codes, f"{NAME}_scale": torch.ones(())}, QWEN3_FP8).read(NAME).isnan().all()


@pytest.mark.parametrize(
    ("scale", "change", "words"),
    [
        (None, {}, "needs one scale beside it, found none"),
        (torch.ones(3, 2), {}, "expected a scale per tensor, per row, or per block of 128×128"),
        (torch.ones(2, 2), {"weight_block_size": None}, "config.json has no weight_block_size"),
        (torch.ones(2, 2, dtype=torch.int32), {}, "is I32"),
        (torch.ones(2, 2), {"weight_block_size": [128]}, "block size"),
        (torch.ones(2, 2), {"weight_block_size": [128, 0]}, "block size"),
        (torch.ones(2, 2), {"weight_block_size": "128"}, "block size"),
    ],
)
def test_what_does_not_fit_is_refused(
    scale: torch.Tensor | None, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    from tests.support.quantisers import quantised_model

    tensors = {NAME: random_codes(192, 160)} | ({} if scale is None else {f"{NAME}_scale_inv": scale})
    assert words in refusal(quantised_model(tmp_path, tensors, QWEN3_FP8 | change)).what


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200), st.integers(1, 200))
def test_the_grid_of_a_declared_block_always_fits(rows: int, columns: int, high: int, wide: int) -> None:
    grid = (-(-rows // high), -(-columns // wide))
    block = fit_grid((rows, columns), grid, (high, wide))
    assert block is not None
    for length, side, declared in zip((rows, columns), block, (high, wide), strict=True):
        assert [index // side for index in range(length)] == [index // declared for index in range(length)]
