"""compressed-tensors: what the library's own compressors write is read as the library decompresses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_svd_distill.checkpoints.quantisation.compressed import read_schemes, scheme_of
from moe_svd_distill.errors import BadDataError
from tests.support.quantisers import opened, quantised_model, same, seeded
from tests.support.refusals import refusal

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"


def config(form: str, weights: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    group = {"format": form, "input_activations": None, "output_activations": None, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": group | {"weights": WEIGHTS | weights}},
        "format": form,
        "global_compression_ratio": None,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    } | others


WEIGHTS: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "observer": "minmax",
    "observer_kwargs": {},
    "strategy": "channel",
    "symmetric": True,
    "type": "int",
}
FP8 = {"type": "float"}
W4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "fp8 channel": ("float-quantized", FP8, "fp8 per channel"),
    "fp8 tensor": ("float-quantized", FP8 | {"strategy": "tensor"}, "fp8 per tensor"),
    "fp8 block": (
        "float-quantized",
        FP8 | {"strategy": "block", "block_structure": [16, 32]},
        "fp8 in blocks of 16×32",
    ),
    "int8 channel": ("int-quantized", {}, "int8 per channel"),
    "int8 asymmetric": ("int-quantized", {"symmetric": False}, "int8 per channel"),
    "int8 naive": ("naive-quantized", {"strategy": "tensor"}, "int8 per tensor"),
    "w4a16": ("pack-quantized", W4, "int4 in groups of 32"),
    "w4a16 asymmetric": ("pack-quantized", W4 | {"symmetric": False}, "int4 in groups of 32"),
    "w4a16 channel": ("pack-quantized", W4 | {"strategy": "channel", "group_size": None}, "int4 per channel"),
    "w8a16": ("pack-quantized", W4 | {"num_bits": 8}, "int8 in groups of 32"),
    "nvfp4": (
        "nvfp4-pack-quantized",
        FP8 | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
        "nvfp4 in groups of 16",
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        FP8 | {"num_bits": 4, "strategy": "group", "group_size": 32},
        "mxfp4 in groups of 32",
    ),
    "mxfp8": ("mxfp8-quantized", FP8 | {"strategy": "group", "group_size": 32}, "mxfp8 in groups of 32"),
}


def compress(form: str, weights: dict[str, Any], rows: int = 40, columns: int = 96) -> tuple[dict[str, Any], Any, Any]:
    """A random weight in the library's compressed form, the scheme, and the weight."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**(WEIGHTS | weights)))
    weight = torch.randn(rows, columns, generator=seeded()).bfloat16()
    state: dict[str, Any] = {"weight": weight, "weight_scale": _scales(scheme.weights, weight)}
    if scheme.weights.strategy == "tensor_group":
        state["weight_global_scale"] = torch.tensor([448.0])
        state["weight_scale"] = (state["weight_scale"].float() * 448).to(torch.float8_e4m3fn).float()
    if form.startswith("mxfp"):
        state["weight_scale"] = torch.exp2(state["weight_scale"].float().log2().ceil()).bfloat16()
    if not scheme.weights.symmetric:
        grid, limit = state["weight_scale"].shape, 2 ** (scheme.weights.num_bits - 1)
        state["weight_zero_point"] = torch.randint(-limit, limit, grid, generator=seeded(2)).to(torch.int8)
    return BaseCompressor.get_value_from_registry(form).compress(state, scheme), scheme, weight


def _scales(args: Any, weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    high, wide = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": args.block_structure or (1, 1),
    }.get(args.strategy, (1, args.group_size))
    largest = {("float", 8): 448.0, ("float", 4): 6.0}.get((args.type, args.num_bits), 2.0 ** (args.num_bits - 1) - 1)
    grid = torch.zeros(-(-rows // high), -(-columns // wide))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            grid[i, j] = weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide].float().abs().max() / largest
    return (grid.view(1) if args.strategy == "tensor" else grid).bfloat16()


@pytest.mark.parametrize("case", CASES)
def test_the_library_compresses_and_we_read(case: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor

    form, weights, label = CASES[case]
    state, scheme, weight = compress(form, weights)
    tensors = {f"{MODULE}.{key}": value for key, value in state.items()}
    tensors |= {"model.norm.weight": torch.ones(8), f"{MODULE}.input_scale": torch.ones(1)}
    tensors |= {"model.layers.0.self_attn.k_scale": torch.ones(1), "model.layers.0.self_attn.v_scale": torch.ones(1)}
    checkpoint = opened(tmp_path, tensors, config(form, weights))
    assert sorted(checkpoint) == [NAME, "model.norm.weight"]
    assert sorted(checkpoint.set_aside) == ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"]
    assert checkpoint.quantisation == f"compressed-tensors: {label}"
    read = checkpoint.read(NAME)
    library = BaseCompressor.get_value_from_registry(form).decompress(dict(state), scheme)["weight"]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, library.to(torch.bfloat16))
    assert torch.equal(checkpoint.read_rows(NAME, 5, 39), read[5:39])
    if "weight_zero_point" not in state and scheme.weights.symmetric:
        bound = 0.2 if scheme.weights.num_bits == 4 else 0.05
        assert float((read.float() - weight.float()).norm() / weight.float().norm()) < bound


@pytest.mark.parametrize("columns", [9, 37, 61, 96])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_end_within_a_word(columns: int, symmetric: bool, tmp_path: Path) -> None:
    weights = {"num_bits": 4, "strategy": "channel", "symmetric": symmetric}
    state, _, _ = compress("pack-quantized", weights, rows=13, columns=columns)
    checkpoint = opened(tmp_path, {f"{MODULE}.{k}": v for k, v in state.items()}, config("pack-quantized", weights))
    assert checkpoint[NAME].shape == (13, columns)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**(WEIGHTS | weights)))
    library = BaseCompressor.get_value_from_registry("pack-quantized").decompress(dict(state), scheme)["weight"]
    assert torch.equal(checkpoint.read(NAME), library)


def test_columns_in_activation_order(tmp_path: Path) -> None:
    weights = W4 | {"symmetric": False, "actorder": "group"}
    state, _, _ = compress("pack-quantized", W4 | {"symmetric": False})
    index = torch.randperm(96, generator=seeded(3)).to(torch.int32) // 32
    tensors = {f"{MODULE}.{key}": value for key, value in state.items()} | {f"{MODULE}.weight_g_idx": index}
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(state["weight_packed"], 4, torch.Size((40, 96))).double()
    zero = unpack_from_int32(state["weight_zero_point"], 4, torch.Size((40, 3)), packed_dim=0).double()
    expected = (codes - zero[:, index.long()]) * state["weight_scale"].double()[:, index.long()]
    same(opened(tmp_path, tensors, config("pack-quantized", weights)).read(NAME), expected)


def test_zero_points_that_are_not_packed(tmp_path: Path) -> None:
    weights = W4 | {"symmetric": False}
    state, _, _ = compress("pack-quantized", weights)
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    new = opened(tmp_path / "new", {f"{MODULE}.{k}": v for k, v in state.items()}, config("pack-quantized", weights))
    state["weight_zero_point"] = unpack_from_int32(state["weight_zero_point"], 4, torch.Size((40, 3)), packed_dim=0)
    old = opened(tmp_path / "old", {f"{MODULE}.{k}": v for k, v in state.items()}, config("pack-quantized", weights))
    assert torch.equal(old.read(NAME), new.read(NAME))


def test_a_mixed_model_follows_the_scheme_of_each_module(tmp_path: Path) -> None:
    eight, _, _ = compress("float-quantized", FP8)
    four, _, _ = compress("pack-quantized", W4)
    groups = config("float-quantized", FP8)["config_groups"] | {
        "group_1": {"targets": ["re:.*experts.*"], "weights": WEIGHTS | W4, "format": "pack-quantized"}
    }
    expert = "model.layers.0.mlp.experts.0.up_proj"
    plain = {"lm_head.weight": torch.randn(8, 8).bfloat16(), "model.layers.0.mlp.gate.weight": torch.ones(4, 8)}
    tensors = {f"{MODULE}.{k}": v for k, v in eight.items()} | {f"{expert}.{k}": v for k, v in four.items()} | plain
    checkpoint = opened(tmp_path, tensors, config("mixed-precision", FP8, config_groups=groups))
    assert sorted(checkpoint) == sorted([NAME, f"{expert}.weight", *plain])
    assert checkpoint.quantisation == "compressed-tensors: fp8 per channel, int4 in groups of 32"
    for name, tensor in plain.items():
        assert torch.equal(checkpoint.read(name), tensor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "marlin-24"}, "format marlin-24 is not read here"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "format sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "stored rotated"),
        ({"config_groups": {}}, "no scheme of config.json is for it alone"),
        ({"config_groups": None}, "without config_groups"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS | {"type": "float"}}}}, "does not fit"),
        ({"config_groups": {"a": {"targets": 7, "weights": WEIGHTS}}}, "no scheme of config.json is for it alone"),
        ({"config_groups": {"a": {"targets": ["re:("], "weights": WEIGHTS}}}, "has the pattern"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS | {"strategy": "attn"}}}}, "strategy attn"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS | {"strategy": "group"}}}}, "group_size 0"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS | {"num_bits": "8"}}}}, "num_bits"),
    ],
)
def test_what_is_not_read_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors = {NAME: torch.ones(8, 8, dtype=torch.int8), f"{NAME}_scale": torch.ones(8, 1)}
    assert words in refusal(quantised_model(tmp_path, tensors, config("int-quantized", {}) | change)).what


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("weight_scale", None, "has no"),
        ("weight_scale", torch.ones(40, 2), "expected group scales [40, 3]"),
        ("weight_zero_point", None, "has no"),
        ("weight_zero_point", torch.ones(4, 3, dtype=torch.int32), "expected zero points [5, 3]"),
        ("weight_shape", torch.tensor([40, 104]), "does not fit"),
        ("weight_shape", torch.tensor([41, 96]), "does not fit"),
        ("weight_packed", torch.ones(40, 12), "does not fit config.json"),
        ("weight_packed", None, "has no"),
        ("weight", torch.ones(40, 96), "stored twice"),
    ],
)
def test_companions_that_do_not_fit_are_refused(key: str, value: Any, words: str, tmp_path: Path) -> None:
    weights = W4 | {"symmetric": False}
    state, _, _ = compress("pack-quantized", weights)
    tensors = {f"{MODULE}.{k}": v for k, v in (state | {key: value}).items() if v is not None}
    assert words in refusal(quantised_model(tmp_path, tensors, config("pack-quantized", weights))).what


def test_widths_that_versions_of_the_library_pack_differently_are_refused(tmp_path: Path) -> None:
    tensors = {
        f"{MODULE}.weight_packed": torch.ones(8, 3, dtype=torch.int32),
        f"{MODULE}.weight_scale": torch.ones(8, 1),
        f"{MODULE}.weight_shape": torch.tensor([8, 32]),
    }
    error = refusal(quantised_model(tmp_path, tensors, config("pack-quantized", {"num_bits": 3})))
    assert "int of 3 bits" in error.what


def scheme(target: str, bits: int) -> dict[str, Any]:
    return {"targets": [target], "weights": WEIGHTS | {"num_bits": bits}}


@given(st.permutations([scheme("Linear", 1), scheme("re:.*up_proj", 2), scheme(MODULE, 3), scheme("Embedding", 4)]))
def test_a_name_comes_before_a_pattern_and_a_pattern_before_a_class(groups: list[dict[str, Any]]) -> None:
    schemes = read_schemes({"config_groups": dict(enumerate(groups))})
    names = {MODULE: 3, "model.layers.1.mlp.up_proj": 2, "model.layers.1.mlp.down_proj": 1}
    for module, bits in names.items():
        found = scheme_of(module, schemes)
        assert found is not None
        assert found.bits == bits


def test_two_schemes_for_the_same_class_are_ambiguous() -> None:
    schemes = read_schemes({"config_groups": {"a": scheme("Linear", 4), "b": scheme("Linear", 8)}})
    assert scheme_of(MODULE, schemes) is None
    with pytest.raises(BadDataError):
        read_schemes({})
