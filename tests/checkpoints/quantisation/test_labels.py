"""config.json says one thing and the data another: the data count where they tell, and nothing is read where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.packed_weights import (
    AWQ,
    GPTQ,
    MODULE,
    NAME,
    NF4,
    affine,
    auto_round,
    awq_words,
    four_bits,
    gptq_tensors,
    integers,
)
from tests.support.quantisers import opened, pack_words, quantised_model, same
from tests.support.refusals import refusal

W4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
PACKED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": W4}},
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("really", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("said", ["gptq", "gptq_v2", None])
def test_symmetric_zero_points_say_which_format_they_are_of(
    said: str | None, really: str, bits: int, tmp_path: Path
) -> None:
    codes, zero, scale = integers(96, 64, bits=bits), torch.full((3, 64), 2 ** (bits - 1)), torch.ones(3, 64).half()
    tensors = gptq_tensors(codes, zero, scale, None, bits, really == "gptq")
    checkpoint = opened(tmp_path, tensors, GPTQ | {"bits": bits, "sym": True, "checkpoint_format": said})
    same(checkpoint.read(NAME), affine(codes, zero, scale, torch.arange(96) // 32), torch.float16)
    assert checkpoint.quantisation is not None
    assert ("config.json says" in checkpoint.quantisation) == ((said or "gptq") != really)


def test_zero_points_that_no_symmetric_model_has_are_refused(tmp_path: Path) -> None:
    codes, scale = integers(64, 32, bits=4), torch.ones(2, 32).half()
    tensors = gptq_tensors(codes, integers(2, 32, bits=4, seed=1), scale, None, 4, v1=True)
    opened(tmp_path / "asymmetric", tensors, GPTQ | {"sym": False})
    assert "are not all the middle" in refusal(quantised_model(tmp_path / "m", tensors, GPTQ | {"sym": True})).what
    alike = gptq_tensors(codes, torch.full((2, 32), 5), scale, None, 4, v1=True)
    assert "are not all the middle" in refusal(quantised_model(tmp_path / "n", alike, GPTQ | {"sym": True})).what


def test_a_model_with_modules_of_both_formats_is_refused(tmp_path: Path) -> None:
    codes, zero, scale = integers(64, 32, bits=4), torch.full((2, 32), 8), torch.ones(2, 32).half()
    first = gptq_tensors(codes, zero, scale, None, 4, v1=True)
    second = gptq_tensors(codes, zero, scale, None, 4, v1=False)
    tensors = first | {name.replace("up_proj", "down_proj"): tensor.clone() for name, tensor in second.items()}
    assert "both GPTQ formats" in refusal(quantised_model(tmp_path, tensors, GPTQ)).what


@pytest.mark.parametrize("really", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round"])
def test_symmetric_zero_points_of_auto_round_do_so_too(packing: str, really: str, tmp_path: Path) -> None:
    codes, zero, scale = integers(96, 64, bits=4), torch.full((3, 64), 8), torch.ones(3, 64).half()
    tensors = gptq_tensors(codes, zero, scale, None, 4, really == "gptq")
    checkpoint = opened(tmp_path, tensors, auto_round(packing, sym=True))
    same(checkpoint.read(NAME), affine(codes, zero, scale, torch.arange(96) // 32), torch.float16)


@pytest.mark.parametrize("sym", [True, False])
def test_a_module_of_auto_round_that_is_not_as_symmetric_as_the_others(sym: bool, tmp_path: Path) -> None:
    other = "model.layers.1.mlp.up_proj"
    codes, scale = integers(64, 32, bits=4), torch.ones(2, 32).half()
    even, uneven = torch.full((2, 32), 8), integers(2, 32, bits=4, seed=1)
    tensors = gptq_tensors(codes, even if sym else uneven, scale, None, 4, v1=True)
    own = gptq_tensors(codes, uneven if sym else even, scale.clone(), None, 4, v1=True)
    tensors |= {name.replace(MODULE, other): tensor for name, tensor in own.items()}
    config = auto_round("auto_round:auto_gptq", sym=sym, extra_config={other: {"sym": not sym}})
    read = opened(tmp_path, tensors, config).read(f"{other}.weight")
    same(read, affine(codes, uneven if sym else even, scale, torch.arange(64) // 32), torch.float16)


@pytest.mark.parametrize(("middle", "fits"), [(8, True), (7, False), (None, False)])
def test_awq_with_zero_points_that_it_says_it_has_not(middle: int | None, fits: bool, tmp_path: Path) -> None:
    codes, scale = integers(64, 48, bits=4), torch.ones(2, 48).half()
    zero = integers(2, 48, bits=4, seed=1) if middle is None else torch.full((2, 48), middle)
    tensors = {
        f"{MODULE}.qweight": awq_words(codes),
        f"{MODULE}.qzeros": awq_words(zero),
        f"{MODULE}.scales": scale,
    }
    config = AWQ | {"zero_point": False}
    if fits:
        read = opened(tmp_path, tensors, config).read(NAME)
        same(read, affine(codes, zero, scale, torch.arange(64) // 32), torch.float16)
    else:
        error = refusal(quantised_model(tmp_path, tensors, config))
        assert "holds zero points, but config.json says zero_point: false" in error.what


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shift", [0, 3])
def test_compressed_tensors_with_zero_points_that_it_says_it_has_not(shift: int, packed: bool, tmp_path: Path) -> None:
    codes, zero = integers(40, 96, bits=4), torch.full((40, 3), shift)
    tensors = {
        f"{MODULE}.weight_packed": pack_words(codes, 4),
        f"{MODULE}.weight_scale": torch.ones(40, 3).bfloat16(),
        f"{MODULE}.weight_shape": torch.tensor([40, 96]),
        f"{MODULE}.weight_zero_point": pack_words((zero + 8).T, 4).T if packed else zero.to(torch.int8),
    }
    if shift:
        assert "config.json says symmetric" in refusal(quantised_model(tmp_path, tensors, PACKED)).what
    else:
        same(opened(tmp_path, tensors, PACKED).read(NAME), codes.double() - 8)


def test_a_nested_state_without_its_offset_is_refused(tmp_path: Path) -> None:
    tensors, _ = four_bits((16, 64), 64, 256)
    name = f"{NAME}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist()))
    del state["nested_offset"]
    tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    assert "no usable block sizes and offset" in refusal(quantised_model(tmp_path, tensors, NF4)).what
