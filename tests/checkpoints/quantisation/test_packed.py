"""GPTQ and AWQ, packed here the way their own libraries pack, and held against the formula in float64."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.packed_weights import AWQ, GPTQ, MODULE, NAME, affine, auto_round, awq_words, gptq_tensors, integers
from tests.support.quantisers import opened, pack_words, quantised_model, same, seeded
from tests.support.refusals import refusal


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("written", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("order", ["activation", "plain", "absent"])
def test_gptq(bits: int, written: str | None, order: str, tmp_path: Path) -> None:
    inputs, outputs, group = 96, 64, 32
    codes, zero = integers(inputs, outputs, bits=bits), integers(3, outputs, bits=bits, seed=1)
    scale = (torch.rand(3, outputs, generator=seeded(2)) + 0.01).half()
    index = torch.arange(inputs) // group
    if order == "activation":
        index = index[torch.randperm(inputs, generator=seeded(3))]
    stored = None if order == "absent" else index
    tensors = gptq_tensors(codes, zero, scale, stored, bits, written != "gptq_v2")
    settings_ = GPTQ | {"bits": bits, "checkpoint_format": written, "desc_act": order == "activation"}
    checkpoint = opened(tmp_path, tensors | {f"{MODULE}.bias": torch.ones(outputs)}, settings_)
    assert sorted(checkpoint) == [f"{MODULE}.bias", NAME]
    expected = affine(codes, zero, scale, index)
    same(checkpoint.read(NAME), expected, torch.float16)
    same(checkpoint.read_rows(NAME, 37, 50), expected[37:50], torch.float16)


def test_gptq_words_bit_by_bit() -> None:
    """The test's own packing against auto-gptq's loop for 3 bits, where codes straddle words."""
    codes = integers(32, 5, bits=3).numpy().astype("uint32")
    words = torch.zeros(3, 5, dtype=torch.int64).numpy().astype("uint32")
    for j in range(10):
        words[0] |= codes[j] << (3 * j)
    words[0] |= codes[10] << 30
    words[1] |= (codes[10] >> 2) & 1
    for j in range(11, 21):
        words[1] |= codes[j] << (3 * (j - 11) + 1)
    words[1] |= codes[21] << 31
    words[2] |= (codes[21] >> 1) & 3
    for j in range(22, 32):
        words[2] |= codes[j] << (3 * (j - 22) + 2)
    ours = pack_words(torch.from_numpy(codes.astype("int64")).T, 3).T
    assert torch.equal(ours, torch.from_numpy(words.view("int32")))


def test_a_symmetric_zero_point_of_the_first_format(tmp_path: Path) -> None:
    """The words that every symmetric 4-bit GPTQ model on the hub holds, ``0x77777777``, mean the zero point 8."""
    codes, scale = integers(32, 8, bits=4), torch.ones(1, 8).half()
    tensors = gptq_tensors(codes, torch.full((1, 8), 8), scale, None, 4, v1=True)
    assert int(tensors[f"{MODULE}.qzeros"][0, 0]) == 0x77777777
    same(opened(tmp_path, tensors, GPTQ).read(NAME), (codes.double() - 8).T, torch.float16)


def test_one_group_for_all_inputs(tmp_path: Path) -> None:
    codes, zero, scale = integers(64, 32, bits=4), integers(1, 32, bits=4), torch.ones(1, 32).bfloat16()
    for folder, index in (("with", torch.zeros(64)), ("without", None)):
        tensors = gptq_tensors(codes, zero, scale, index, 4, v1=True)
        read = opened(tmp_path / folder, tensors, GPTQ | {"group_size": -1}).read(NAME)
        same(read, affine(codes, zero, scale, torch.zeros(64).long()))


def test_modules_with_bits_of_their_own(tmp_path: Path) -> None:
    """GPTQModel's ``dynamic``: the shapes say the bits of each module."""
    wide = integers(64, 32, bits=8), integers(2, 32, bits=8, seed=1), torch.ones(2, 32).half()
    index = torch.arange(64) // 32
    tensors = gptq_tensors(*wide, index, 8, v1=True)
    dynamic = {r"+:.*\.up_proj": {"bits": 8}}
    read = opened(tmp_path, tensors, GPTQ | {"dynamic": dynamic}).read(NAME)
    same(read, affine(*wide, index), torch.float16)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 80), st.booleans())
def test_awq(groups: int, words: int, cut: int, asymmetric: bool) -> None:
    inputs, outputs = groups * 32, words * 8
    codes, zero = integers(inputs, outputs, bits=4), integers(groups, outputs, bits=4, seed=1)
    scale = (torch.rand(groups, outputs, generator=seeded(2)) + 0.01).half()
    tensors = {f"{MODULE}.qweight": awq_words(codes), f"{MODULE}.scales": scale}
    if asymmetric:
        tensors[f"{MODULE}.qzeros"] = awq_words(zero)
    else:
        zero = torch.full_like(zero, 8)
    expected = affine(codes, zero, scale, torch.arange(inputs) // 32)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = opened(Path(folder), tensors, AWQ | {"zero_point": asymmetric})
        same(checkpoint.read(NAME), expected, torch.float16)
        same(checkpoint.read_rows(NAME, cut, None), expected[cut:], torch.float16)
        checkpoint.close()


def test_awq_as_the_library_converts_it(tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    tensors = {
        f"{MODULE}.qweight": awq_words(integers(64, 48, bits=4)),
        f"{MODULE}.qzeros": awq_words(integers(2, 48, bits=4, seed=1)),
        f"{MODULE}.scales": torch.rand(2, 48, generator=seeded(2)).half(),
    }
    read = opened(tmp_path, tensors, AWQ).read(NAME)
    converter = AutoAWQConverter.from_autoawq_config(AWQ)
    converted = converter.process(dict(tensors))
    (scheme,) = converter.update_config(None).config_groups.values()
    state = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in converted.items()}
    library = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
    assert torch.allclose(read.float(), library.float(), rtol=1e-3, atol=0)


def small_gptq() -> dict[str, Tensor]:
    return gptq_tensors(
        integers(64, 32, bits=4), integers(2, 32, bits=4), torch.ones(2, 32).half(), torch.arange(64) // 32, 4, v1=True
    )


@pytest.mark.parametrize(
    ("change", "tensors", "words"),
    [
        ({"checkpoint_format": "marlin"}, {}, "checkpoint_format marlin"),
        ({}, {"qweight": torch.ones(8, 32)}, "expected I32"),
        ({}, {"g_idx": torch.zeros(60, dtype=torch.int32)}, "bits for each input"),
        ({}, {"g_idx": torch.zeros(64)}, "expected I32 [64]"),
        ({}, {"scales": None}, "has no"),
        ({}, {"qzeros": None}, "has no"),
        ({}, {"scales": torch.ones(3, 32).half()}, "expected F16 [2, 32]"),
        ({}, {"qzeros": torch.ones(2, 5, dtype=torch.int32)}, "expected I32 [2, 4]"),
        ({}, {"weight": torch.ones(32, 64)}, "stored twice"),
        ({"quant_method": "awq", "version": "gemv"}, {}, "AWQ version gemv"),
        ({"quant_method": "awq", "bits": 8}, {}, "of 8 bits"),
        ({"quant_method": "awq", "zero_point": True}, {"qzeros": None, "g_idx": None}, "has no"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], tensors: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    changed = small_gptq() | {f"{MODULE}.{key}": value for key, value in tensors.items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    assert words in refusal(quantised_model(tmp_path, kept, GPTQ | change)).what


def test_an_index_that_points_outside_is_refused_when_read(tmp_path: Path) -> None:
    from moe_svd_distill.errors import BadDataError

    tensors = small_gptq()
    tensors[f"{MODULE}.g_idx"][5] = 2
    with pytest.raises(BadDataError, match="names the groups 0 to 2"):
        opened(tmp_path, tensors, GPTQ).read(NAME)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "packing",
    [None, "auto_round:auto_gptq", "auto_round:gptq", "auto_round", "auto_round:gptqmodel"],
)
def test_auto_round(bits: int, packing: str | None, tmp_path: Path) -> None:
    """Zero points are stored less one where the name says GPTQ, and as they are in AutoRound's own packing."""
    codes, zero = integers(192, 64, bits=bits), integers(6, 64, bits=bits, seed=1)
    scale = (torch.rand(6, 64, generator=seeded(2)) + 0.01).half()
    less_one = packing not in ("auto_round", "auto_round:gptqmodel")
    tensors = gptq_tensors(codes, zero, scale, None, bits, less_one)
    read = opened(tmp_path, tensors, auto_round(packing, bits=bits)).read(NAME)
    same(read, affine(codes, zero, scale, torch.arange(192) // 32), torch.float16)


def test_a_ragged_last_group_of_auto_round(tmp_path: Path) -> None:
    codes, zero = integers(576, 200, bits=4), integers(5, 200, bits=4, seed=1)
    scale = (torch.rand(5, 200, generator=seeded(2)) + 0.01).bfloat16()
    tensors = gptq_tensors(codes, zero, scale, None, 4, v1=True)
    read = opened(tmp_path, tensors, auto_round("auto_round:auto_gptq", group_size=128)).read(NAME)
    same(read, affine(codes, zero, scale, torch.arange(576) // 128))


@pytest.mark.parametrize("key", [MODULE, r".*layers\.0\.mlp.*"], ids=["by name", "by pattern"])
def test_modules_with_settings_of_their_own_in_auto_round(key: str, tmp_path: Path) -> None:
    codes, zero, scale = integers(96, 64, bits=8), integers(6, 64, bits=8, seed=1), torch.rand(6, 64).half() + 1
    tensors = gptq_tensors(codes, zero, scale, None, 8, v1=True)
    other = gptq_tensors(integers(64, 32, bits=4), integers(2, 32, bits=4), torch.ones(2, 32).half(), None, 4, v1=True)
    tensors |= {name.replace(MODULE, "model.layers.1.mlp.up_proj"): tensor for name, tensor in other.items()}
    extra = {key: {"bits": 8, "group_size": 16}, "model.layers.1": {"bits": 2}, "lm_head": {"bits": 16}}
    checkpoint = opened(tmp_path, tensors, auto_round("auto_round:auto_gptq", extra_config=extra))
    same(checkpoint.read(NAME), affine(codes, zero, scale, torch.arange(96) // 16), torch.float16)
    assert checkpoint.quantisation == "auto-round: int4 in groups of 32, int8 in groups of 16"


@pytest.mark.parametrize("packing", ["auto_round:auto_awq", "auto_round:awq"])
def test_auto_round_as_awq(packing: str, tmp_path: Path) -> None:
    codes, zero, scale = integers(64, 48, bits=4), integers(2, 48, bits=4, seed=1), torch.rand(2, 48).half() + 1
    tensors = {f"{MODULE}.qweight": awq_words(codes), f"{MODULE}.qzeros": awq_words(zero), f"{MODULE}.scales": scale}
    read = opened(tmp_path, tensors, auto_round(packing)).read(NAME)
    same(read, affine(codes, zero, scale, torch.arange(64) // 32), torch.float16)


def unpacked_by_auto_round(words: Tensor, bits: int) -> Tensor:
    """As `QuantLinear.forward` takes int32 words apart, (rows, words) to (rows, codes).

    Of AutoRound, `auto_round_extension/torch/qlinear_torch_zp.py` at 0a8ebdf. Codes of 3 bits lie across three words.
    """
    if bits != 3:
        return ((words[..., None] >> torch.arange(0, 32, bits)) & (2**bits - 1)).flatten(1)
    a, b, c = words.view(len(words), -1, 3).unbind(-1)
    codes = [a >> 3 * place for place in range(10)]
    codes += [(a >> 30) & 3 | (b << 2) & 4, *(b >> 3 * place + 1 for place in range(10))]
    codes += [(b >> 31) & 1 | (c << 1) & 6, *(c >> 3 * place + 2 for place in range(10))]
    return (torch.stack(codes, dim=-1) & 7).flatten(1)


@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_auto_round_as_the_library_multiplies_any_words(bits: int, less_one: bool, tmp_path: Path) -> None:
    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=seeded(bits)).to(torch.int32)

    scale = (torch.rand(3, 64, generator=seeded(2)) / 8 + 0.01).half()
    packed, zeros = words(96 * bits // 32, 64), words(3, 64 * bits // 32)
    tensors = {f"{MODULE}.qweight": packed, f"{MODULE}.qzeros": zeros, f"{MODULE}.scales": scale}
    zero = (unpacked_by_auto_round(zeros, bits) + less_one) % 2**bits
    codes = unpacked_by_auto_round(packed.T.contiguous(), bits).T
    library = scale.repeat_interleave(32, dim=0) * (codes - zero.repeat_interleave(32, dim=0))
    packing = "auto_round:auto_gptq" if less_one else "auto_round"
    read = opened(tmp_path, tensors, auto_round(packing, bits=bits), dtype="float32").read(NAME)
    assert torch.equal(read, library.T)


@pytest.mark.parametrize(
    ("change", "tensors", "words"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, {}, "packing_format 'auto_round:llm_compressor'"),
        ({"packing_format": ["\x1b"]}, {}, "\\x1b"),
        ({"data_type": "mx_fp"}, {}, "data_type mx_fp"),
        ({"bits": 8}, {}, "expected F16 [1, 32]"),
        ({"group_size": 16}, {}, "expected F16 [4, 32]"),
        ({"extra_config": {MODULE: {"bits": 2}}}, {}, "expected F16 [4, 32]"),
        ({"extra_config": {"(": {"bits": 2}}}, {}, "has the pattern '('"),
        ({}, {"scales": None}, "has no"),
        ({}, {"qzeros": None}, "has no"),
        ({}, {"qweight": None}, "auto-round does not explain it"),
    ],
)
def test_what_does_not_fit_auto_round_is_refused(
    change: dict[str, Any], tensors: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    changed = small_gptq() | {f"{MODULE}.{key}": value for key, value in tensors.items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None and "g_idx" not in name}
    assert words in refusal(quantised_model(tmp_path, kept, auto_round("auto_round:auto_gptq") | change)).what
