"""gpt-oss's MXFP4 and bitsandbytes, against the libraries that write them and the formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.checkpoints.storage import Storage
from moe_svd_distill.checkpoints.survey import survey
from moe_svd_distill.errors import DistillError
from moe_svd_distill.files.header import Header, read_header
from tests.support.packed_weights import NAME, NF4, four_bits, random_bytes
from tests.support.quantisers import opened, quantised_model, seeded
from tests.support.refusals import refusal

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
GPT_OSS: dict[str, Any] = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    "quant_method": "mxfp4",
}
INT8: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 6.0, "quant_method": "bitsandbytes"}


def experts(groups: int = 3) -> dict[str, Tensor]:
    scales = torch.randint(100, 140, (3, 20, groups), dtype=torch.uint8, generator=seeded(1))
    return {f"{EXPERTS}_blocks": random_bytes(3, 20, groups, 16), f"{EXPERTS}_scales": scales}


def test_gpt_oss_experts_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    plain = {f"{EXPERTS}_bias": torch.randn(3, 20).bfloat16()}
    checkpoint = opened(tmp_path, experts() | plain, GPT_OSS)
    assert sorted(checkpoint) == [EXPERTS, f"{EXPERTS}_bias"]
    assert checkpoint[EXPERTS].shape == (3, 96, 20)
    assert checkpoint.quantisation == "mxfp4: mxfp4 in groups of 32"
    expected = convert_moe_packed_tensors(experts()[f"{EXPERTS}_blocks"], experts()[f"{EXPERTS}_scales"])
    assert torch.equal(checkpoint.read(EXPERTS), expected)
    assert torch.equal(checkpoint.read_rows(EXPERTS, 1, 2), expected[1:2])
    for transposed in (True, False):
        wanted = checkpoint.read(EXPERTS)[1].mT if transposed else checkpoint.read(EXPERTS)[1]
        assert torch.equal(checkpoint.read_matrix(EXPERTS, 1, 3, 11, transposed=transposed), wanted[3:11])
        assert torch.equal(checkpoint.read_matrix(EXPERTS, 1, 0, None, transposed=transposed), wanted)


def test_the_sixteen_numbers_of_four_bits(tmp_path: Path) -> None:
    """OCP Microscaling Formats 1.0: sign, two bits of exponent, one of mantissa; the first number in the low half."""
    low = torch.arange(16, dtype=torch.uint8)
    tensors = {f"{EXPERTS}_blocks": (low | (15 - low << 4)).view(1, 1, 1, 16)}
    tensors[f"{EXPERTS}_scales"] = torch.full((1, 1, 1), 128, dtype=torch.uint8)
    read = opened(tmp_path, tensors, GPT_OSS).read(EXPERTS).flatten().double() / 2

    def value(code: int) -> float:
        sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
        size = mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2)
        return -size if sign else size

    assert read[0::2].tolist() == [value(code) for code in range(16)]
    assert read[1::2].tolist() == [value(15 - code) for code in range(16)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{EXPERTS}_scales": None}, "has no"),
        ({f"{EXPERTS}_scales": random_bytes(3, 20, 2)}, "expected U8 [3, 20, 3]"),
        ({f"{EXPERTS}_blocks": random_bytes(3, 20, 48)}, "expected U8 of shape [experts, rows, groups, 16]"),
        ({f"{EXPERTS}_blocks": None}, "mxfp4 does not explain it"),
    ],
)
def test_experts_that_do_not_fit_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in (experts() | change).items() if tensor is not None}
    assert words in refusal(quantised_model(tmp_path, tensors, GPT_OSS)).what


@pytest.mark.parametrize("shape", [(16, 64), (7, 33), (5, 13)])
@pytest.mark.parametrize(("block", "nested"), [(64, None), (64, 256), (16, 4)])
def test_codebooks(shape: tuple[int, int], block: int, nested: int | None, tmp_path: Path) -> None:
    tensors, expected = four_bits(shape, block, nested)
    checkpoint = opened(tmp_path, tensors, NF4)
    assert list(checkpoint) == [NAME]
    assert checkpoint[NAME].shape == shape
    for begin, end in ((0, None), (3, 5), (4, 4)):
        read, wanted = checkpoint.read_rows(NAME, begin, end), expected[begin:end]
        assert read.dtype == torch.bfloat16
        assert read.shape == wanted.shape
        assert torch.allclose(read.double(), wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_what_the_library_itself_quantises(kind: str, double: bool, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(40, 96, generator=seeded()).bfloat16()
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double, blocksize=64)
    tensors = {NAME: codes} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    checkpoint = opened(tmp_path, tensors, NF4 | {"bnb_4bit_quant_type": kind})
    library = functional.dequantize_4bit(codes, state)
    assert torch.allclose(checkpoint.read(NAME).float(), library.float(), rtol=2**-7, atol=1e-6)
    assert float((checkpoint.read(NAME).float() - weight.float()).norm() / weight.float().norm()) < 0.15


def test_rows_of_eight_bits(tmp_path: Path) -> None:
    codes, scale = random_bytes(24, 40).view(torch.int8), torch.rand(24, generator=seeded(1))
    module = NAME.removesuffix(".weight")
    tensors = {NAME: codes, f"{module}.SCB": scale, f"{module}.weight_format": torch.zeros((), dtype=torch.uint8)}
    checkpoint = opened(tmp_path / "rows", tensors, INT8)
    expected = codes.double() * scale.double()[:, None] / 127
    assert torch.allclose(checkpoint.read(NAME).double(), expected, rtol=2**-8, atol=0)
    tensors[f"{module}.weight_format"] += 1
    assert "not stored row by row" in refusal(quantised_model(tmp_path / "turing", tensors, INT8)).what


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"absmax": None}, "found nothing"),
        ({"absmax": torch.rand(3)}, "should be 16 elements of F32"),
        ({"quant_map": torch.rand(15)}, "should be 16 elements"),
        ({"quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "is not valid JSON"),
        ({"quant_state.bitsandbytes__nf4": torch.zeros(70_000, dtype=torch.uint8)}, "is not what its name says"),
        ({"quant_state.bitsandbytes__nf4": None}, "bitsandbytes does not explain it"),
    ],
)
def test_states_that_do_not_fit_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors, _ = four_bits((16, 64), 64, None)
    changed = tensors | {f"{NAME}.{key}": value for key, value in change.items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    assert words in refusal(quantised_model(tmp_path, kept, NF4)).what


def test_the_state_of_a_model_whose_headers_alone_are_here(tmp_path: Path) -> None:
    folder = quantised_model(tmp_path, four_bits((16, 64), 64, None)[0], NF4)
    header = read_header(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    class HeadersAlone(Storage):
        def file_names(self) -> list[str]:
            return ["config.json", "model.safetensors"]

        def headers(self, files: Sequence[str]) -> dict[str, Header | DistillError]:
            return {"model.safetensors": header}

    (fault,) = survey(HeadersAlone(folder), "model").faults
    assert "not at hand with the headers alone" in fault.what
    assert fault.action == "Download the model and give its folder"
    with pytest.raises(Exception, match=r"holds no model\.safetensors"):
        open_checkpoint(folder)
