from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_svd_distill.adapter.merge import merge
from moe_svd_distill.adapter.naming import lora_keys
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError, CannotWriteError, DistillError
from moe_svd_distill.files.header import read_header
from tests.adapter.conftest import Case
from tests.support import tiny

Write = Callable[..., Path]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    student = tiny.save_student(tmp_path / "student", "glm4_moe", shard="15KB")
    assert len(list(student.glob("*.safetensors"))) > 3
    (student / "tokenizer.json").write_text("{}")
    (student / "LICENSE").write_text("free")
    (student / "templates").mkdir()
    (student / "templates" / "chat.jinja").write_text("{{ x }}")
    (student / "pytorch_model.bin").write_bytes(b"old weights")
    (student / "extra.gguf").write_bytes(b"old weights")
    (student / ".hidden").write_text("x")
    return student


def test_layout_and_untouched_tensors_stay_byte_for_byte(sharded: Path, tmp_path: Path) -> None:
    pairs = tiny.random_pairs(sharded, [n for n in tiny.carried(sharded) if "q_proj" in n])
    adapter = tiny.save_adapter(tmp_path / "adapter", sharded, pairs)
    seen: list[tuple[int, int]] = []
    report = merge(adapter, sharded, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    assert report.merged == tiny.LAYERS
    assert seen[-1] == (report.bytes, report.bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert report.companions == (
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "templates/chat.jinja",
        "tokenizer.json",
    )
    assert report.left_out == (".hidden", "extra.gguf", "pytorch_model.bin")
    for name in report.companions:
        assert (tmp_path / "out" / name).read_bytes() == (sharded / name).read_bytes()
    for file in sorted(sharded.glob("*.safetensors")):
        before, after = read_header(file), read_header(tmp_path / "out" / file.name)
        assert before.digest == after.digest
        assert (tmp_path / "out" / file.name).stat().st_mode & 0o777 == 0o644
    before, after = tiny.hub_weights(sharded), tiny.hub_weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj.weight" in name}
    assert not list(tmp_path.glob(".*writing"))


def test_an_open_checkpoint_is_as_good_as_a_folder(sharded: Path, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tmp_path / "adapter", sharded, tiny.random_pairs(sharded))
    with open_checkpoint(sharded) as checkpoint:
        merge(adapter, checkpoint, tmp_path / "one")
    merge(adapter, str(sharded), str(tmp_path / "two"))
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_pair_that_hits_nothing_is_an_error(dense: Case, write: Write, tmp_path: Path) -> None:
    renamed = {key.replace(".layers.", ".blocks."): value for key, value in dense.pairs.items()}
    with pytest.raises(BadDataError, match=r"has no model\.blocks\.0\..* to change"):
        merge(write(dense, renamed), dense.student, tmp_path / "out")
    student = tiny.save_student(tmp_path / "short", "llama", num_hidden_layers=2)
    with pytest.raises(BadDataError, match=r"has no model\.layers\.2\..* to change"):
        merge(dense.adapter, student, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_shape_is_an_error(dense: Case, tmp_path: Path) -> None:
    student = tiny.save_student(tmp_path / "wide", "llama", intermediate_size=64)
    with pytest.raises(BadDataError, match="is 32×64 in the student, the adapter's is 32×48"):
        merge(dense.adapter, student, tmp_path / "out")


def test_tied_embeddings_are_an_error(dense: Case, tmp_path: Path) -> None:
    student = tiny.save_student(tmp_path / "tied", "llama", tie_word_embeddings=True)
    with pytest.raises(BadDataError, match="ties its head"):
        merge(dense.adapter, student, tmp_path / "out")


def test_values_that_are_not_finite_stop_the_merge(dense: Case, write: Write, tmp_path: Path) -> None:
    key = lora_keys("model.layers.1.self_attn.q_proj")[1]
    pairs = dense.pairs | {key: torch.full_like(dense.pairs[key], float("nan"))}
    with pytest.raises(BadDataError, match=r"layers\.1\.self_attn\.q_proj\.weight: merged values that are not finite"):
        merge(write(dense, pairs), dense.student, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_output_in_use_is_refused(dense: Case, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(CannotWriteError, match="not an empty folder"):
        merge(dense.adapter, dense.student, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert merge(dense.adapter, dense.student, tmp_path / "empty").merged == 22
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotWriteError):
        merge(dense.adapter, dense.student, tmp_path / "file")


def test_a_full_disk_leaves_nothing_behind(dense: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWriteError, match="the disk is full"):
        merge(dense.adapter, dense.student, tmp_path / "out")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CannotWriteError, match="GB free"):
        merge(dense.adapter, dense.student, tmp_path / "out")


def test_a_quantised_student_is_refused(dense: Case, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(dense.student, student)
    weights = load_file(student / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DistillError):
        merge(dense.adapter, student, tmp_path / "out")


def test_the_student_is_not_touched(dense: Case, tmp_path: Path) -> None:
    def digests() -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in dense.student.iterdir()}

    before = digests()
    merge(dense.adapter, dense.student, tmp_path / "out")
    assert digests() == before
