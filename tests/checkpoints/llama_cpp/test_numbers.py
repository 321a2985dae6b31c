"""Every type of numbers is what the package `gguf` makes of it, whole and by rows."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError, DistillError

gguf = pytest.importorskip("gguf")

WIDTH, ROWS = 512, 40
NAME = "model.layers.0.mlp.down_proj.weight"
PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")


def file_with(path: Path, data: Any, kind: str, name: str = "blk.0.ffn_down.weight", **settings: float) -> Path:
    """A file with one tensor of a type, and what every file needs."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(ROWS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    for key, value in settings.items():
        writer.add_float32(f"qwen2.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((8, ROWS), np.float32))
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: str, rows: int = ROWS) -> Any:
    """Random bytes; a block whose scale is no number comes now and then."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return np.random.default_rng(0).integers(0, 256, (rows, WIDTH // elements * size), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_the_package_s_numbers(tmp_path: Path, kind: str) -> None:
    stored = blocks(kind)
    wanted = torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[kind]))
    assert wanted.isfinite().any()
    with open_checkpoint(file_with(tmp_path / "model.gguf", stored, kind)) as checkpoint:
        info = checkpoint[NAME]
        assert (info.shape, info.dtype, info.bytes) == ((ROWS, WIDTH), "F32", stored.nbytes)
        assert checkpoint.stored["blk.0.ffn_down.weight"].dtype == kind
        torch.testing.assert_close(checkpoint.read(NAME), wanted, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(checkpoint.read_rows(NAME, 7, 23), wanted[7:23], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", PLAIN)
def test_floats_are_views_on_the_file(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    stored = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    wanted = torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[kind]).copy())
    with open_checkpoint(file_with(tmp_path / "model.gguf", stored, kind)) as checkpoint:
        read = checkpoint.read(NAME)
        assert read.dtype is PLAIN[kind]
        assert checkpoint.is_plain(NAME)
        assert torch.equal(read.float(), wanted)


@pytest.mark.parametrize("name", ["blk.0.ffn_down_exps.weight", "blk.0.strange.weight", "v.patch_embd.weight"])
def test_a_tensor_without_a_place_is_named(tmp_path: Path, name: str) -> None:
    file = file_with(tmp_path / "model.gguf", np.zeros((2, 4), np.float32), "F32", name)
    with pytest.raises(BadDataError, match=f"{name}.*has no place in qwen2"):
        open_checkpoint(file)


def test_settings_that_nothing_is_made_of(tmp_path: Path) -> None:
    with open_checkpoint(file_with(tmp_path / "model.gguf", blocks("Q8_0"), "Q8_0", strange=1.5)) as checkpoint:
        assert checkpoint.set_aside.keys() == {"qwen2.strange"}
    with pytest.raises(BadDataError, match=r"the setting qwen2\.logit_scale = 1\.5, which changes"):
        open_checkpoint(file_with(tmp_path / "model.gguf", blocks("Q8_0"), "Q8_0", logit_scale=1.5))


def test_a_type_that_the_package_cannot_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="Q8_K"):
        open_checkpoint(file_with(tmp_path / "model.gguf", blocks("Q8_K"), "Q8_K"))


def test_damage_is_named_whatever_is_cut_off_or_overwritten(tmp_path: Path) -> None:
    whole = file_with(tmp_path / "model.gguf", blocks("Q4_K"), "Q4_K").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for end in (0, 3, 20, 30, 200, 400, len(whole) // 2, len(whole) - 1000):
        damaged.write_bytes(whole[:end])
        with pytest.raises(BadDataError) as caught:
            open_checkpoint(damaged)
        assert caught.value.exit_code == 65
    generator = np.random.default_rng(1)
    for _ in range(300):
        piece = bytearray(whole)
        place = int(generator.integers(0, 700))
        piece[place : place + 8] = generator.integers(0, 256, 8, dtype=np.uint8).tobytes()
        damaged.write_bytes(piece)
        with suppress(DistillError):  # nothing else
            open_checkpoint(damaged).close()


def test_a_damaged_count_ends_at_once(tmp_path: Path) -> None:
    """Where the package's own reader goes on for as many elements as the file says."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_array("some.numbers", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    place = content.index(b"some.numbers") + len(b"some.numbers") + 8
    content[place : place + 8] = (2**40).to_bytes(8, "little")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(BadDataError, match="its header alone asks for"):
        open_checkpoint(tmp_path / "model.gguf")


def test_an_architecture_that_is_not_known_is_refused_in_a_line(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bert")
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DistillError, match=r"llama\.cpp's architecture 'bert'") as caught:
        open_checkpoint(tmp_path / "model.gguf")
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_what_is_no_model_is_refused(tmp_path: Path, kind: str) -> None:
    """As `export --format gguf` writes, or what lies beside a model that sees."""
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadDataError, match=rf"is of general\.type '{kind}' \(expected model\)\. Give the model's file"):
        open_checkpoint(tmp_path / "other.gguf")


def test_what_is_no_gguf_file_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" * 20)
    with pytest.raises(BadDataError, match="is not a GGUF file"):
        open_checkpoint(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n")
    with pytest.raises(BadDataError, match="a pointer of git-lfs"):
        open_checkpoint(tmp_path / "model.gguf")
    with pytest.raises(DistillError, match=r"the file .* is not there"):
        open_checkpoint(str(tmp_path / "other.gguf"))
    with pytest.raises(DistillError, match="Give the file itself"):
        open_checkpoint(tmp_path)


def test_without_the_package_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_svd_distill.checkpoints.llama_cpp import header

    file = file_with(tmp_path / "model.gguf", blocks("Q8_0"), "Q8_0")
    monkeypatch.setattr(header, "find_spec", lambda name: None)
    with pytest.raises(DistillError, match=r"moe-svd-distill\[gguf\]"):
        open_checkpoint(file)


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    file = file_with(tmp_path / "model.gguf", blocks("Q8_0"), "Q8_0")
    script = (
        "import sys\nfrom moe_svd_distill.checkpoints import open_checkpoint\n"
        "found = open_checkpoint(sys.argv[1])\nprint(len(found), len(found.fingerprint()), len(found.cache_key()))\n"
        "sys.exit(str({'torch', 'transformers'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", str(len("gguf-1:") + 64), "64"], done.stderr
    assert done.stderr.strip() == ""
