"""FP8 and FP4 of DeepSeek-V4, MiniMax-M3 and modelopt, against the libraries that write them and in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.checkpoints.storage import Storage
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.files.header import read_header
from tests.support.quantisers import (
    E2M1,
    QWEN3_FP8,
    deepseek_fp4,
    expand,
    float8_blocks,
    in_groups,
    mxfp8,
    nvfp4,
    opened,
    quantised_model,
    same,
    seeded,
    unpack_fp4,
)
from tests.support.refusals import refusal

LINEAR = "layers.0.attn.wq_a"
EXPERT = "layers.0.ffn.experts.0.w1"
MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
V4: dict[str, Any] = QWEN3_FP8 | {"scale_fmt": "ue8m0", "modules_to_not_convert": None}
MXFP8: dict[str, Any] = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
NVFP4: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
    "quant_algo": "NVFP4",
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quant_method": "modelopt",
}
SHAPES = [(576, 192), (192, 200), (200, 576), (8, 16)]


def modelopt(algorithm: str | None, **others: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm} | others


def weight(*shape: int, seed: int = 0) -> Tensor:
    """Rows and columns of different sizes, so that a scale in the wrong place shows."""
    return torch.randn(shape, generator=seeded(seed)) * torch.linspace(0.02, 3, shape[-1]) + 0.01


def exponents(*shape: int) -> Tensor:
    return torch.randint(100, 140, shape, dtype=torch.uint8, generator=seeded(1))


def powers(exponent: Tensor) -> Tensor:
    return 2.0 ** (exponent.double() - 127)


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(2))


def test_the_numbers_of_four_bits_in_these_tests() -> None:
    """Sign, two bits of exponent, one of mantissa."""
    for code in range(16):
        sign, exponent, mantissa = (-1) ** (code >> 3), (code >> 1) & 3, code & 1
        size = mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2)
        assert float(E2M1[code]) == sign * size


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scales", ["F8_E8M0", "U8", "F32", "BF16"])
def test_deepseek_v4(shape: tuple[int, int], scales: str, tmp_path: Path) -> None:
    """FP8 in blocks of 128×128 and FP4 experts in groups of 32, each with its ``scale``."""
    rows, columns = shape
    codes, _ = float8_blocks(weight(*shape), (128, 128))
    blocks = exponents(-(-rows // 128), -(-columns // 128))
    packed, groups = random_bytes(rows, columns // 2).view(torch.int8), exponents(rows, -(-columns // 32))

    def stored(exponent: Tensor) -> Tensor:
        if scales in ("F8_E8M0", "U8"):
            return exponent.view(torch.float8_e8m0fnu) if scales == "F8_E8M0" else exponent
        return powers(exponent).to({"F32": torch.float32, "BF16": torch.bfloat16}[scales])

    tensors = {f"{LINEAR}.weight": codes, f"{LINEAR}.scale": stored(blocks)}
    tensors |= {f"{EXPERT}.weight": packed, f"{EXPERT}.scale": stored(groups)}
    checkpoint = opened(tmp_path, tensors | {"layers.0.hc_attn_scale": torch.ones(3)}, V4, expert_dtype="fp4")
    assert sorted(checkpoint) == [f"{LINEAR}.weight", f"{EXPERT}.weight", "layers.0.hc_attn_scale"]
    assert checkpoint[f"{EXPERT}.weight"].shape == shape
    dense = codes.double() * expand(powers(blocks), shape, (128, 128))
    expert = unpack_fp4(packed) * in_groups(powers(groups), shape, 32)
    same(checkpoint.read(f"{LINEAR}.weight"), dense)
    same(checkpoint.read(f"{EXPERT}.weight"), expert)
    same(checkpoint.read_rows(f"{EXPERT}.weight", 3, 7), expert[3:7])


@pytest.mark.parametrize("shape", [(64, 128), (3, 24, 64)])
@pytest.mark.parametrize("kind", ["E8M0", "bytes"])
def test_fp4_and_mxfp8_as_transformers_dequantises_them(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    groups = exponents(*shape[:-1], shape[-1] // 32)
    scale = groups if kind == "bytes" else groups.view(torch.float8_e8m0fnu)
    packed = random_bytes(*shape[:-1], shape[-1] // 2).view(torch.int8)
    floats = weight(*shape).to(torch.float8_e4m3fn)
    library = Fp8Dequantize(None)
    for codes, config in ((packed, V4 | {"expert_dtype": "fp4"}), (floats, MXFP8)):
        name = NAME if len(shape) == 2 else FUSED
        read = opened(tmp_path / str(codes.dtype), {name: codes, f"{name}_scale_inv": scale}, config).read(name)
        assert torch.equal(read, library._dequantize_one(codes, scale, output_dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["fp8", "mxfp8", "mxfp8 of modelopt", "declared"])
def test_mxfp8(shape: tuple[int, int], method: str, tmp_path: Path) -> None:
    codes, groups = mxfp8(weight(*shape))
    config = {
        "fp8": QWEN3_FP8 | {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        "mxfp8": MXFP8,
        "mxfp8 of modelopt": modelopt("MXFP8", group_size=32),
        "declared": MXFP8 | {"weight_block_size": [1, 32]},
    }[method]
    suffix = "_scale" if "modelopt" in method else "_scale_inv"
    checkpoint = opened(tmp_path, {NAME: codes, NAME + suffix: groups}, config)
    expected = codes.double() * in_groups(powers(groups), shape, 32)
    same(checkpoint.read(NAME), expected)
    assert float((expected - weight(*shape)).norm() / weight(*shape).norm()) < 0.04
    assert "mxfp8 in groups of 32" in str(checkpoint.quantisation) or shape[-1] < 32


@pytest.mark.parametrize(("byte", "value"), [(0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (254, 2.0**127)])
def test_every_exponent(byte: int, value: float, tmp_path: Path) -> None:
    codes, scale = torch.ones(2, 2).to(torch.float8_e4m3fn), torch.full((1, 1), byte, dtype=torch.uint8)
    checkpoint = opened(tmp_path, {NAME: codes, f"{NAME}_scale": scale}, MXFP8, dtype="float32")
    assert checkpoint.read(NAME).unique().tolist() == [value]


def nvfp4_tensors(*shape: int, name: str = NAME) -> dict[str, Tensor]:
    codes, scale, second = nvfp4(weight(*shape))
    prefix = name if name == NAME else f"{name}_weight"
    return {name: codes, f"{prefix}_scale": scale, f"{prefix}_scale_2": second}


@pytest.mark.parametrize("shape", SHAPES)
def test_nvfp4_of_modelopt(shape: tuple[int, int], tmp_path: Path) -> None:
    tensors = nvfp4_tensors(*shape)
    others = {f"{MODULE}.input_scale": torch.ones(()), "model.layers.0.self_attn.k_proj.k_scale": torch.ones(())}
    checkpoint = opened(tmp_path, tensors | others, NVFP4)
    assert list(checkpoint) == [NAME]
    assert checkpoint.quantisation == "modelopt: nvfp4 in groups of 16" or shape[-1] < 32
    scale = in_groups(tensors[f"{NAME}_scale"].double(), shape, 16) * tensors[f"{NAME}_scale_2"].double()
    expected = unpack_fp4(tensors[NAME]) * scale
    assert torch.allclose(checkpoint.read(NAME).double(), expected, rtol=2**-8, atol=0)
    assert float((expected - weight(*shape)).norm() / weight(*shape).norm()) < 0.13


def test_nvfp4_as_compressed_tensors_converts_it(tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter

    tensors = nvfp4_tensors(40, 96)
    converter = ModelOptNvfp4Converter(targets=["re:.*up_proj"])
    converted = converter.process(dict(tensors))
    (scheme,) = converter.update_config(None).config_groups.values()
    state = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in converted.items()}
    library = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(state, scheme)["weight"]
    read = opened(tmp_path, tensors, NVFP4).read(NAME)
    assert torch.allclose(read.float(), library.float(), rtol=2**-7, atol=0)


def test_nvfp4_and_mxfp8_bit_for_bit_as_modelopt_dequantises_them(tmp_path: Path) -> None:
    """In float32: `NVFP4QTensor.dequantize` multiplies the scales first, `MXFP8QTensor.dequantize` by a power of two.

    Of modelopt 0.47, `torch/quantization/qtensor/nvfp4_tensor.py` and `mxfp8_tensor.py`, which need more than is here.
    """
    tensors = nvfp4_tensors(64, 192)
    per_block = tensors[f"{NAME}_scale"].to(torch.float32) * tensors[f"{NAME}_scale_2"].float()
    library = unpack_fp4(tensors[NAME]).float().view(64, -1, 16) * per_block.unsqueeze(-1)
    read = opened(tmp_path / "nvfp4", tensors, NVFP4, dtype="float32").read(NAME)
    assert torch.equal(read, library.view(64, 192))
    codes, scale = mxfp8(weight(64, 192))
    library = (codes.float().view(-1, 32) * torch.exp2(scale.float() - 127).view(-1, 1)).view(64, 192)
    read = opened(tmp_path / "mxfp8", {NAME: codes, f"{NAME}_scale": scale}, modelopt("MXFP8")).read(NAME)
    assert torch.equal(read, library.to(torch.bfloat16))


@pytest.mark.parametrize("each", [True, False], ids=["a second scale for each expert", "one for all"])
def test_fused_experts_of_modelopt(each: bool, tmp_path: Path) -> None:
    codes, scale = random_bytes(3, 24, 20), weight(3, 24, 3, seed=1).abs().to(torch.float8_e4m3fn)
    second = torch.rand(3 if each else 1, generator=seeded(3))
    names = (FUSED, f"{FUSED}_weight_scale", f"{FUSED}_weight_scale_2", f"{FUSED}_input_scale")
    tensors = dict(zip(names, (codes, scale, second, torch.ones(3)), strict=True))
    checkpoint = opened(tmp_path, tensors, NVFP4, dtype="float32")
    whole = in_groups(scale.double(), (3, 24, 40), 16) * second.double().view(-1, 1, 1)
    expected = unpack_fp4(codes) * whole
    for begin, end in ((0, None), (1, 3), (2, 3)):
        assert torch.allclose(checkpoint.read_rows(FUSED, begin, end).double(), expected[begin:end], rtol=1e-6)
    matrix = checkpoint.read_matrix(FUSED, 2, 3, 11, transposed=False)
    assert torch.allclose(matrix.double(), expected[2, 3:11], rtol=1e-6)


@pytest.mark.parametrize("shape", [(576, 192), (192, 200)])
@pytest.mark.parametrize("scales", ["tensor", "channel", "block", "block of 4 dimensions"])
def test_fp8_of_modelopt(shape: tuple[int, int], scales: str, tmp_path: Path) -> None:
    codes = weight(*shape).to(torch.float8_e4m3fn)
    blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
    size = {"tensor": (), "channel": (shape[0],), "block": blocks}.get(scales, (blocks[0], 1, blocks[1], 1))
    scale = torch.rand(size, generator=seeded(1)) + 0.1
    algorithm = {"tensor": "FP8", "channel": "FP8_PER_CHANNEL_PER_TOKEN"}.get(scales, "fp8_pb_wo")
    tensors = {NAME: codes, f"{NAME}_scale": scale, f"{MODULE}.input_scale": torch.ones(())}
    read = opened(tmp_path, tensors, modelopt(algorithm)).read(NAME)
    grid = expand(scale.double().view(blocks), shape, (128, 128)) if "block" in scales else scale.double().view(-1, 1)
    same(read, codes.double() * grid)


def test_layers_of_several_algorithms(tmp_path: Path) -> None:
    """As DeepSeek-V4-Pro-NVFP4: attention in the FP8 of the original, experts in NVFP4."""
    codes, blocks = float8_blocks(weight(192, 200), (128, 128))
    floats, groups = mxfp8(weight(24, 64))
    tensors = nvfp4_tensors(24, 200) | {f"{LINEAR}.weight": codes, f"{LINEAR}.scale": blocks}
    tensors |= {"a.weight": floats, "a.weight_scale": groups}
    layers = {MODULE: {"quant_algo": "NVFP4", "group_size": 16}, "a": {"quant_algo": "MXFP8", "group_size": 32}}
    checkpoint = opened(tmp_path, tensors, modelopt("MIXED_PRECISION", quantized_layers=layers))
    same(checkpoint.read(f"{LINEAR}.weight"), codes.double() * expand(blocks.double(), (192, 200), (128, 128)))
    same(checkpoint.read("a.weight"), floats.double() * in_groups(powers(groups), (24, 64), 32))
    assert "float8 in blocks of 128×128, mxfp8 in groups of 32, nvfp4 in groups of 16" in str(checkpoint.quantisation)


@pytest.mark.parametrize(
    ("own", "written"),
    [
        (None, {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"], "kv_cache_quant_algo": "FP8"}),
        (NVFP4, {"quant_algo": "NVFP4", "group_size": 16}),
        (V4, {"quant_algo": "NVFP4", "group_size": 16}),
    ],
    ids=["alone", "beside modelopt's", "beside that of the original"],
)
def test_a_quantisation_that_stands_in_a_file_of_its_own(own: Any, written: dict[str, Any], tmp_path: Path) -> None:
    tensors = nvfp4_tensors(24, 200)
    expected = opened(tmp_path / "expected", tensors, NVFP4).read(NAME)
    folder = quantised_model(tmp_path / "model", tensors, own)
    headers = {"model.safetensors": read_header(folder / "model.safetensors")}
    before = Storage(folder).cache_key(headers)
    file = folder / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": written}))
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.read(NAME), expected)
    assert checkpoint.cache_key() != before
    for wrong in ("FP8", None):
        file.write_text(json.dumps({"quantization": written | {"quant_algo": wrong}} if wrong else {"producer": {}}))
        assert own is not NVFP4 or "hf_quant_config.json" in refusal(folder).what


def test_a_quantisation_in_a_file_of_its_own_beside_another_method(tmp_path: Path) -> None:
    folder = quantised_model(tmp_path, nvfp4_tensors(24, 200), {"quant_method": "gptq", "bits": 4})
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert "two different quantisations" in refusal(folder).what


@pytest.mark.parametrize("said", ["fp4", "fp8", None])
@pytest.mark.parametrize("stored", ["fp4", "fp8"])
@pytest.mark.parametrize("expert", [EXPERT, FUSED], ids=["by number", "fused"])
def test_experts_are_what_their_tensors_show(said: str | None, stored: str, expert: str, tmp_path: Path) -> None:
    """Whatever config.json calls them, which is then said; the attention is FP8 in either case."""
    shape = (192, 320) if expert == EXPERT else (2, 192, 320)
    name, scale_name = (f"{EXPERT}.weight", f"{EXPERT}.scale") if expert == EXPERT else (FUSED, f"{FUSED}_scale_inv")
    block = (*(1,) * (len(shape) - 2), 128, 128)
    if stored == "fp4":
        codes, groups = random_bytes(*shape[:-1], 160).view(torch.int8), exponents(*shape[:-1], 10)
        expected = unpack_fp4(codes) * in_groups(powers(groups), shape, 32)
    else:
        codes, groups = weight(*shape).to(torch.float8_e4m3fn), exponents(*shape[:-2], 2, 3)
        expected = codes.double() * expand(powers(groups), shape, block)
    dense, blocks = float8_blocks(weight(192, 200), (128, 128))
    tensors = {name: codes, scale_name: groups, f"{LINEAR}.weight": dense, f"{LINEAR}.scale": blocks}
    checkpoint = opened(tmp_path, tensors, V4, **({} if said is None else {"expert_dtype": said}))
    same(checkpoint.read(name), expected)
    same(checkpoint.read(f"{LINEAR}.weight"), dense.double() * expand(blocks.double(), (192, 200), (128, 128)))
    if said in (None, stored):
        assert checkpoint.notes == ()
    else:
        (note,) = checkpoint.notes
        label = "mxfp4 in groups of 32" if stored == "fp4" else "float8 in blocks of 128×128"
        assert note == f"config.json says expert_dtype {said}, but '{name}' is stored as {label}: read so"


def test_what_config_json_says_otherwise_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        opened(tmp_path, fp4_tensors(), V4, expert_dtype="fp8").close()
    (line,) = caplog.messages
    assert line.startswith(f"note: {tmp_path}: config.json says expert_dtype fp8")


def fp4_tensors() -> dict[str, Tensor]:
    codes, scale = deepseek_fp4(weight(24, 200))
    return {f"{EXPERT}.weight": codes, f"{EXPERT}.scale": scale}


@pytest.mark.parametrize(
    ("config", "changed", "words"),
    [
        (V4, {f"{EXPERT}.scale": None}, "is I8 and needs one scale beside it, found none"),
        (V4, {f"{EXPERT}.weight": None}, "of dtype F8_E8M0 in"),
        (V4, {f"{EXPERT}.scale": torch.ones(24, 7)}, "does not say expert_dtype fp4"),
        (V4 | {"scale_fmt": "float"}, {}, "as config.json says scale_fmt float"),
        (V4, {f"{EXPERT}.scale": exponents(24, 6)}, "expected scales [24, 7] in groups of 32"),
        (V4, {f"{EXPERT}.scale": exponents(1, 1)}, "expected scales [24, 7] in groups of 32"),
        (V4, {f"{EXPERT}.scale": exponents(24, 7).long()}, "expected a scale of dtype BF16, F16, F32, F8_E4M3"),
        (
            V4,
            {f"{EXPERT}.weight": torch.ones(24, 200).bfloat16(), f"{EXPERT}.scale": torch.ones(1, 2)},
            "beside a scale",
        ),
        (V4, {f"{EXPERT}.weight_scale": torch.ones(24, 7)}, "needs one scale beside it, found"),
        (V4, {f"{EXPERT}.weight_scale_2": torch.ones(())}, "no second scale beside mxfp4"),
        (V4, {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, "needs one scale beside it, found none"),
        (NVFP4, {f"{EXPERT}.scale": torch.ones(24, 13).to(torch.float8_e4m3fn)}, "weight_scale_2' beside it"),
    ],
)
def test_what_does_not_fit_deepseek_v4_is_refused(
    config: dict[str, Any], changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    kept = {name: tensor for name, tensor in (fp4_tensors() | changed).items() if tensor is not None}
    error = refusal(quantised_model(tmp_path, kept, config))
    assert words in error.what
    assert error.exit_code == BadDataError.exit_code == 65


@pytest.mark.parametrize(
    ("config", "changed", "words"),
    [
        (NVFP4, {f"{NAME}_scale": None}, "needs one scale beside it, found none"),
        (NVFP4, {f"{NAME}_scale_2": None}, "weight_scale_2' beside it"),
        (NVFP4, {NAME: None}, "modelopt does not explain it"),
        (NVFP4, {f"{NAME}_scale_2": torch.ones(24)}, "expected F32 with 1 numbers"),
        (NVFP4, {f"{NAME}_scale": torch.ones(24, 13)}, "does not say expert_dtype fp4"),
        (NVFP4, {NAME: torch.ones(24, 200).bfloat16()}, "modelopt does not explain it"),
        (NVFP4, {f"{MODULE}.pre_quant_scale": torch.ones(200)}, "changes what the layer computes"),
        (modelopt("NVFP4", group_size=32), {}, "expected scales [24, 7] in groups of 32"),
        (modelopt("NVFP4", group_size="16"), {}, "group_size"),
        (modelopt("NVFP4_AWQ"), {}, "quant_algo NVFP4_AWQ is not read here"),
        (modelopt("W4A16_AWQ"), {}, "quant_algo W4A16_AWQ"),
        (modelopt("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "W8A16"}}), {}, "quant_algo W8A16"),
        (
            modelopt("MIXED_PRECISION", quantized_layers={"a": {"group_size": 64}, "b": {"group_size": 128}}),
            {},
            "config.json has 64 and 128",
        ),
        (modelopt("\x1b[2J"), {}, "\\x1b"),
    ],
)
def test_what_does_not_fit_modelopt_is_refused(
    config: dict[str, Any], changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    kept = {name: tensor for name, tensor in (nvfp4_tensors(24, 200) | changed).items() if tensor is not None}
    assert words in refusal(quantised_model(tmp_path, kept, config)).what


@pytest.mark.parametrize("broken", [3, [1], {"group_0": 3}, {"group_0": {"weights": "int"}}])
@pytest.mark.parametrize("key", ["config_groups", "quantized_layers"])
def test_settings_of_another_form_say_nothing(key: str, broken: Any, tmp_path: Path) -> None:
    assert opened(tmp_path, nvfp4_tensors(24, 200), modelopt("NVFP4", **{key: broken}))[NAME].shape == (24, 200)


def test_experts_that_are_packed_along_their_rows_are_refused(tmp_path: Path) -> None:
    """Llama 4 and gpt-oss by modelopt: quantised as a transpose and stored transposed back."""
    tensors = {FUSED: random_bytes(3, 20, 24), f"{FUSED}_weight_scale_2": torch.ones(())}
    tensors[f"{FUSED}_weight_scale"] = torch.ones(3, 3, 24).to(torch.float8_e4m3fn)
    assert "expected scales [3, 20, 3]" in refusal(quantised_model(tmp_path, tensors, NVFP4)).what


def test_mistrals_names(tmp_path: Path) -> None:
    codes, scale = weight(24, 40).to(torch.float8_e4m3fn), torch.rand((), generator=seeded(1))
    tensors = {NAME: codes, f"{MODULE}.qscale_weight": scale, f"{MODULE}.qscale_act": torch.ones(())}
    same(opened(tmp_path, tensors, QWEN3_FP8).read(NAME), codes.double() * scale.double())
