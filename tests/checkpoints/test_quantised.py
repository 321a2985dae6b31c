"""Quantised checkpoints as a whole: what is known is read, what is not is refused, and nothing is silently left out."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint, require_plain_files
from moe_svd_distill.errors import BadDataError
from tests.checkpoints.builders import CONFIG, read_index, tiny_tensors, write_model
from tests.support.quantisers import QWEN3_FP8, account, expand, float8_blocks, quantised_model, seeded
from tests.support.refusals import refusal

FP8 = QWEN3_FP8 | {"weight_block_size": [8, 4]}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "quip"}}, "quantization_config quant_method=quip is not"),
        ({"quantization_config": {"format": "something-new"}}, "quant_method=something-new"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "quant_method=hqq"),
        ({"compression_config": {"quant_method": "aqlm"}}, "compression_config"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization quant_method=None (MLX)"),
        ({"quantization_config": "fp8"}, "quant_method=fp8"),
        ({"quantization_config": {"quant_method": ["\x1b[2J"]}}, "\\x1b"),
        ({"quantization_config": {"quant_method": "\x1b[2J"}}, "\\x1b"),
        (
            {"quantization_config": {"quant_method": "fp8"}, "text_config": {"quantization_config": FP8}},
            "two different quantisations",
        ),
    ],
)
def test_a_method_that_is_not_known_is_refused_by_name(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    error = refusal(write_model(tmp_path, config=CONFIG | config))
    assert words in error.what
    assert error.action == "Give the bf16 checkpoint"
    assert error.exit_code == 65


@pytest.mark.parametrize("declared", [None, {"quant_method": "awq", "bits": 4}])
@pytest.mark.parametrize(
    "extra",
    [
        {"a.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)},
        {"a.weight": torch.zeros(2, 2, dtype=torch.float8_e5m2)},
        {"a.weight": torch.zeros(2, 2, dtype=torch.int8)},
        {"a.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 2, dtype=torch.uint8)},
        {"a.weight": torch.zeros(2, 2, dtype=torch.uint32)},
        {"a.weight_scale_inv": torch.zeros(1)},
        {"a.weight_packed": torch.zeros(2, 2, dtype=torch.int32)},
        {"a.weight.absmax": torch.zeros(2)},
        {"a.g_idx": torch.zeros(2, dtype=torch.int32)},
    ],
)
def test_codes_that_nothing_explains_are_refused(tmp_path: Path, extra: dict[str, torch.Tensor], declared: Any) -> None:
    config = CONFIG if declared is None else CONFIG | {"quantization_config": declared}
    write_model(tmp_path, tensors=tiny_tensors() | extra, shards=2, config=config)
    error = refusal(tmp_path)
    assert f"tensor {next(iter(extra))!r} of dtype" in error.what
    expected = "awq does not explain it" if declared else "config.json declares no quantisation"
    assert expected in error.what
    assert ("quantization_config" in error.action) == (declared is None)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    codes = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    folder = quantised_model(tmp_path, {f"m.{i}.weight": codes.clone() for i in range(3)}, FP8)
    assert "3 faults" in refusal(folder).what


@pytest.mark.parametrize("empty", [None, {}, False])
def test_plain_models_pass(tmp_path: Path, empty: object) -> None:
    plain = {"model.position_ids": torch.arange(4), "model.mask": torch.ones(2, dtype=torch.bool)}
    write_model(tmp_path, tensors=tiny_tensors() | plain, config=CONFIG | {"quantization_config": empty})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantisation is None
    assert checkpoint.companions == {}
    account(checkpoint)
    require_plain_files(checkpoint)


def test_a_declared_method_with_plain_tensors_is_plain_but_says_so(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(quantised_model(tmp_path, tiny_tensors(), QWEN3_FP8))
    assert checkpoint.quantisation == "fp8: declared, but every tensor is stored plainly"
    assert list(checkpoint) == list(checkpoint.stored)
    with pytest.raises(BadDataError, match="is quantised"):
        require_plain_files(checkpoint)


def mixed() -> dict[str, torch.Tensor]:
    """Linear layers in FP8, everything else plain, as FP8 models on the hub are."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tiny_tensors().items():
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = float8_blocks(tensor.float(), (8, 4))
        else:
            tensors[name] = tensor
    return tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return quantised_model(tmp_path / "m", mixed(), FP8, shards=3)


def expected() -> dict[str, torch.Tensor]:
    stored = mixed()
    values = {}
    for name in tiny_tensors():
        scale = stored.get(f"{name}_scale_inv")
        values[name] = stored[name]
        if scale is not None:
            grid = expand(scale, tuple(stored[name].shape), (8, 4))
            values[name] = (stored[name].float() * grid).bfloat16()
    return values


def test_a_quantised_model_looks_like_a_plain_one(folder: Path) -> None:
    index = read_index(folder)
    assert len({index[UP], index[f"{UP}_scale_inv"]}) == 2, "the scale is in another shard than the codes"
    checkpoint = open_checkpoint(folder)
    account(checkpoint)
    assert sorted(checkpoint) == sorted(tiny_tensors())
    for name, tensor in expected().items():
        assert checkpoint[name].shape == tuple(tensor.shape)
        assert checkpoint[name].dtype == "BF16"
        assert checkpoint[name].memory_bytes == tensor.numel() * 2
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint[UP].bytes == 16 * 8 + 2 * 2 * 4
    assert checkpoint.quantisation == "fp8: float8 in blocks of 8×4"
    assert checkpoint.companions[f"{UP}_scale_inv"] == UP


def test_rows_of_a_plain_tensor(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    name = "model.embed_tokens.weight"
    assert torch.equal(checkpoint.read_rows(name, 3, 7), tiny_tensors()[name][3:7])
    assert checkpoint.read_rows(name, 3, 7, device="meta").is_meta
    assert checkpoint.read(UP, device="meta").shape == (16, 8)


def test_a_change_in_place_stays_in_that_one_tensor(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.read(UP).zero_()
    assert torch.equal(checkpoint.read(UP), expected()[UP])


def _read_there(checkpoint: Checkpoint) -> list[Any]:
    return [checkpoint.quantisation, {name: checkpoint.read(name).float().numpy() for name in checkpoint}]


def test_it_travels_to_another_process(folder: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        quantisation, values = pool.apply(_read_there, (open_checkpoint(folder),))
    assert quantisation == "fp8: float8 in blocks of 8×4"
    for name, tensor in expected().items():
        assert torch.equal(torch.from_numpy(values[name]), tensor.float())


def test_the_key_covers_scales_and_configuration(folder: Path) -> None:
    before = open_checkpoint(folder).cache_key()
    file = folder / read_index(folder)[f"{UP}_scale_inv"]
    tensors = load_file(file)
    tensors[f"{UP}_scale_inv"][0, 0] *= 2
    save_file(tensors, file)
    scaled = open_checkpoint(folder).cache_key()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [8, 5]
    (folder / "config.json").write_text(json.dumps(config))
    assert len({before, scaled, open_checkpoint(folder).cache_key()}) == 3


def test_a_companion_that_is_cut_off_while_open_is_noticed(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    file = folder / read_index(folder)[f"{UP}_scale_inv"]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(BadDataError):
        checkpoint.read(UP)


HEADERS_ONLY = """
import sys
from moe_svd_distill.checkpoints import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
print(checkpoint.quantisation, sorted({info.dtype for info in checkpoint.values()}))
heavy = {"torch", "numpy", "safetensors", "transformers", "compressed_tensors"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_headers_are_understood_without_any_heavy_import(folder: Path) -> None:
    assert run(HEADERS_ONLY, folder) == "fp8: float8 in blocks of 8×4 ['BF16']\n"


PEAK = """
import sys
import torch
from pathlib import Path
from moe_svd_distill.checkpoints import open_checkpoint
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
small, large = (open_checkpoint(folder) for folder in sys.argv[1:])
name = next(iter(large))
small.read(name)  # what torch itself needs at its first use
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
tensor = large.read(name)
print(status("VmHWM") - before, large[name].bytes + large[name].memory_bytes)
"""


def fp8_of(rows: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    codes = torch.zeros(rows, 2048, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return {UP: codes, f"{UP}_scale_inv": torch.ones(-(-rows // 128), 16)}, QWEN3_FP8


def gptq_of(rows: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    module, words = UP.removesuffix(".weight"), torch.int32
    tensors = {
        f"{module}.qweight": torch.zeros(256, rows, dtype=words),
        f"{module}.qzeros": torch.zeros(16, rows // 8, dtype=words),
        f"{module}.scales": torch.ones(16, rows).half(),
        f"{module}.g_idx": (torch.arange(2048) // 128).to(words),
    }
    return tensors, {"quant_method": "gptq", "bits": 4, "group_size": 128}


def gpt_oss_of(rows: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    blocks = torch.zeros(8, rows // 8, 64, 16, dtype=torch.uint8)
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": torch.ones_like(blocks[..., 0])}
    return tensors, {"quant_method": "mxfp4"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("make", [fp8_of, gptq_of, gpt_oss_of])
def test_memory_is_what_is_stored_and_what_comes_out(make: Any, tmp_path: Path) -> None:
    folders = [quantised_model(tmp_path / str(rows), *make(rows)) for rows in (512, 16 * 1024)]
    peak, bound = map(int, run(PEAK, *folders).split())
    assert peak < bound + 12 * 2**20, f"{peak / 2**20:.0f} MiB for {bound / 2**20:.0f} MiB"
    assert peak > bound / 3, "it was read at all"


def test_the_numbers_do_not_depend_on_the_size_of_a_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_svd_distill.checkpoints.quantisation import decoding

    codes = torch.randn(200, 96, generator=seeded()).to(torch.float8_e4m3fn)
    tensors = {UP: codes, f"{UP}_scale_inv": torch.rand(2, 1, generator=seeded(1))}
    checkpoint = open_checkpoint(quantised_model(tmp_path, tensors, QWEN3_FP8))
    whole = checkpoint.read(UP)
    monkeypatch.setattr(decoding, "SLAB_ELEMENTS", 1)
    assert torch.equal(checkpoint.read(UP), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name, tensor in expected().items():
        read = checkpoint.read(name, device="cuda:0")
        assert read.device == torch.device("cuda:0")
        assert torch.equal(read.cpu(), tensor)
