"""GGUF files through the whole pipeline: as the teacher, and as the student whose adapter opens on the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file

from moe_svd_distill.adapter.verify import check_loads, verify
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.cli.main import program
from moe_svd_distill.errors import BadDataError, UsageError
from moe_svd_distill.evaluation.request import BenchmarkRequest
from moe_svd_distill.pipeline.distill import distill, load_adapter
from moe_svd_distill.pipeline.evaluate import evaluate
from moe_svd_distill.pipeline.pair import open_pair
from moe_svd_distill.pipeline.texts import read_run_text
from tests.support.heads import TEXT, TRAINED, student_with_tokenizer, teacher_with_other_head, trained_tokenizer
from tests.support.models import load, logits, saved
from tests.support.pairs import recipe_for

pytest.importorskip("gguf")
from tests.support.gguf_files import write_gguf

ORIGIN = "org/student-0.1B"
MOE = {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4}


def of_origin(writer: Any) -> None:
    writer.add_source_url(f"https://huggingface.co/{ORIGIN}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teacher and student as folders and as files: the teacher's in plain numbers, the student's in blocks."""
    folder = tmp_path_factory.mktemp("models")
    student = student_with_tokenizer("llama", folder / "student", trained_tokenizer(folder / "tokenizer", 300))
    teacher = teacher_with_other_head(student, folder / "teacher")
    return {
        "teacher": teacher,
        "student": student,
        "teacher_file": write_gguf(teacher, folder / "teacher.gguf"),
        "student_file": write_gguf(student, folder / "student.gguf", "Q8_0", change=of_origin),
        "nameless_file": write_gguf(student, folder / "nameless.gguf", "Q8_0"),
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_gguf_teacher_gives_the_adapter_of_its_original(models: dict[str, Path], tmp_path: Path) -> None:
    of_folder, of_file = tmp_path / "folder", tmp_path / "file"
    distill(recipe_for(models["teacher"], models["student"], of_folder, **TRAINED))
    distill(recipe_for(models["teacher_file"], models["student"], of_file, **TRAINED))
    wanted, found = tensors(of_folder), tensors(of_file)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    record = load_adapter(of_file).record
    assert record.teacher.source == str(models["teacher_file"])
    assert record.transferred


def test_experts_of_a_gguf_teacher_reach_the_workers(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(tmp_path / "tokenizer", 300)
    teacher = student_with_tokenizer("qwen3_moe", tmp_path / "teacher", tokenizer, **MOE)
    student = saved("qwen3_moe", tmp_path / "student", seed=5, dtype=torch.float32, vocab_size=300, **MOE)
    file = write_gguf(teacher, tmp_path / "teacher.gguf")
    given = {"method": "weights", "rank": 4, "head_rank": 4}
    distill(recipe_for(teacher, student, tmp_path / "of_folder", **given))
    distill(recipe_for(file, student, tmp_path / "of_file", **given))
    wanted, found = tensors(tmp_path / "of_folder"), tensors(tmp_path / "of_file")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def finished(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The adapter of a GGUF student, made on the command line, and what was printed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    recipe = recipe_for(models["teacher"], models["student_file"], out, **TRAINED)
    file = out.parent / "recipe.yaml"
    file.write_text(json.dumps({key: json.loads(recipe.model_dump_json())[key] for key in recipe.model_fields_set}))
    done = CliRunner().invoke(program, ["distill", str(file)])
    assert done.exit_code == 0, done.output
    return out, done.output


def test_the_adapter_of_a_gguf_student_opens_on_the_original(
    models: dict[str, Path], finished: tuple[Path, str]
) -> None:
    out, printed = finished
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == ORIGIN
    assert f"the adapter is for {ORIGIN}, as general.source.url of the student says" in " ".join(printed.split())
    assert "Next, for llama.cpp: moe-svd-distill export" in printed
    assert f'from_pretrained("{ORIGIN}"' in (out / "README.md").read_text()
    report = check_loads(out, models["student"])
    assert report.targets
    assert not report.missing
    original = load(models["student"])
    before = logits(original)
    adapted = PeftModel.from_pretrained(original, str(out))
    assert not torch.allclose(logits(adapted), before, atol=1e-3)


def test_what_else_takes_a_gguf_student(models: dict[str, Path], finished: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = finished
    with open_checkpoint(models["student_file"]) as student, open_checkpoint(models["teacher_file"]) as other:
        found = verify(out, student)
        assert found.load
        assert not any("other weights" in warning for warning in found.warnings)
        assert any("other weights" in warning for warning in verify(out, other).warnings)
    assert not any("other weights" in warning for warning in verify(out, models["student"]).warnings), "its original"
    found = evaluate(out, [TEXT], tokens=2000).evaluation.on_text
    teacher, student = (str(models[name]) for name in ("teacher_file", "student_file"))
    again = evaluate(out, [TEXT], teacher=teacher, student=student, tokens=2000, mode="streamed").evaluation.on_text
    assert found is not None
    assert again is not None
    assert again.student.kl == pytest.approx(found.student.kl, rel=1e-3)
    for arguments in (
        ["inspect", str(models["student_file"])],
        ["inspect", str(models["teacher_file"]), str(models["student_file"])],
        [
            *("plan", str(out.parent / "recipe.yaml"), "--teacher", str(models["teacher_file"])),
            *("--output", str(tmp_path / "planned")),
        ],
    ):
        done = CliRunner().invoke(program, arguments)
        assert done.exit_code == 0, done.output
    merged = CliRunner().invoke(
        program, ["merge", str(out), str(tmp_path / "m"), "--student", str(models["student_file"])]
    )
    assert "is quantised (gguf: F16, F32, Q8_0)" in str(merged.exception)
    exported = CliRunner().invoke(
        program,
        ["export", str(out), str(tmp_path / "e"), "--format", "plain", "--student", str(models["student_file"])],
    )
    assert exported.exit_code == 0, exported.output


def test_a_tokenizer_from_beside_the_file_is_said(models: dict[str, Path], tmp_path: Path) -> None:
    def unknown(writer: Any) -> None:
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "of-my-own"

    write_gguf(models["teacher"], tmp_path / "teacher.gguf", change=unknown)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models["teacher"] / name, tmp_path / name)
    recipe = recipe_for(tmp_path / "teacher.gguf", models["student"], tmp_path / "out", **TRAINED)
    with open_pair(recipe.teacher, recipe.student) as pair:
        text = read_run_text(recipe, pair, ["refined"])
    assert any("is the tokenizer.json beside it" in note for note in text.shortfalls())


def test_a_file_that_does_not_say_its_origin(models: dict[str, Path], tmp_path: Path) -> None:
    given = {**TRAINED, "method": "refined"}
    with pytest.raises(UsageError, match="does not say which checkpoint") as caught:
        distill(recipe_for(models["teacher"], models["nameless_file"], tmp_path / "out", **given))
    assert caught.value.action == "Name it: --base-model organisation/name"
    named = recipe_for(models["teacher"], models["nameless_file"], tmp_path / "out", base_model="org/other", **given)
    distill(named)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/other"


def test_the_harness_is_refused(
    models: dict[str, Path], finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_svd_distill.evaluation.benchmarks.version", lambda name: "0.4.13")
    with pytest.raises(UsageError, match="is a GGUF file"):
        evaluate(finished[0], benchmarks=BenchmarkRequest(("task",)))


def test_a_damaged_student_is_refused_before_anything_is_written(models: dict[str, Path], tmp_path: Path) -> None:
    whole = models["student_file"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadDataError, match="is cut off"):
        distill(recipe_for(models["teacher"], tmp_path / "cut.gguf", tmp_path / "out", **TRAINED))
    assert not (tmp_path / "out").exists()
