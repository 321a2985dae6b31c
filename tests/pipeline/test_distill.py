"""Distil, on real files in real processes: what is written, and what is refused without a trace."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from moe_svd_distill.adapter.verify import verify
from moe_svd_distill.errors import (
    BadDataError,
    CannotWriteError,
    MissingInputError,
    NothingToTransferError,
)
from moe_svd_distill.pipeline.distill import distill, load_adapter
from moe_svd_distill.pipeline.output import judge_output
from moe_svd_distill.pipeline.pair import open_model
from moe_svd_distill.pipeline.plan import make_plan
from moe_svd_distill.recipe import Recipe
from tests.support.events import notes_to
from tests.support.models import load, logits, saved
from tests.support.pairs import planted_pair, recipe_for, with_tensors


@pytest.mark.parametrize("model_type", ["glm4_moe", "llama", "mixtral", "qwen3", "qwen3_moe"])
def test_a_full_rank_adapter_of_a_planted_student_reproduces_the_teacher(model_type: str, tmp_path: Path) -> None:
    from peft import PeftModel

    teacher, student, _ = planted_pair(model_type, tmp_path)
    adapter = distill(recipe_for(teacher, student, tmp_path / "out", rank="full", head_rank="full"))
    wanted, base = logits(load(teacher)), load(student)
    assert float((logits(base) - wanted).abs().max()) > 0.01
    adapted = PeftModel.from_pretrained(base, str(adapter.folder))
    assert float((logits(adapted) - wanted).abs().max()) < 1e-3
    report = verify(adapter.folder)
    assert report.load is not None
    assert report.digest_checked


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    folder = tmp_path_factory.mktemp("finished")
    wide = {"hidden_size": 48, "num_hidden_layers": 3, "num_experts": 6, "moe_intermediate_size": 24}
    teacher = saved("qwen3_moe", folder / "t", seed=1, **wide)
    recipe = recipe_for(teacher, saved("qwen3_moe", folder / "s", seed=2), folder / "out", rank=4, head_rank=8)
    distill(recipe)
    return recipe, folder / "out"


def test_the_record_names_the_fate_of_every_student_tensor(finished: tuple[Recipe, Path]) -> None:
    recipe, out = finished
    record = load_adapter(out).record.content
    student = open_model(recipe.student).checkpoint
    assert sorted(row["name"] for row in record["tensors"]) == sorted(student)
    for row in record["tensors"]:
        assert row["fate"] in ("lora", "kept")
        assert row["fate"] == "lora" or row["reason"]
        assert row["fate"] == "kept" or {"rank", "relative_delta", "residual", "projection"} <= set(row)
    assert record["transferred"] is None
    assert "Not measured" in record["scale_search"]["decision"]
    assert record["adapter_sha256"] == hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_the_folder_holds_what_the_contract_says(finished: tuple[Recipe, Path]) -> None:
    _, out = finished
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "run.json"} <= {
        p.name for p in out.iterdir()
    }
    for path in out.glob("adapter*"):
        assert path.stat().st_mode & 0o777 == 0o644


def test_running_again_computes_nothing_and_gives_the_same_bytes(finished: tuple[Recipe, Path]) -> None:
    recipe, out = finished
    before = load_adapter(out)
    again = distill(recipe)
    assert again.sha256 == before.sha256
    assert again.record.content["execution"]["units_computed"] == 0
    assert again.record.content["execution"]["units_reused"] == 4


def test_the_bytes_do_not_depend_on_the_number_of_workers(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, out = finished
    for workers in (2, 3):
        changed = recipe.model_copy(update={"workers": workers, "output": tmp_path / str(workers)})
        assert distill(changed).sha256 == load_adapter(out).sha256


def test_a_changed_recipe_reuses_no_part_and_deletes_none(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, out = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    parts = {path.name for path in (copy / "parts").iterdir()}
    other = distill(recipe.model_copy(update={"output": copy, "rank": 5}), force=True)
    assert other.record.content["execution"]["units_reused"] == 2  # head and embeddings: their rank is their own
    assert parts < {path.name for path in (copy / "parts").iterdir()}


def test_teacher_equal_to_student_is_refused_as_a_no_op(tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path / "m")
    copy = shutil.copytree(model, tmp_path / "copy")
    for method, reason in (("auto", "hold the same weights"), ("weights", "exactly zero")):
        with pytest.raises(NothingToTransferError, match=reason) as caught:
            distill(recipe_for(model, copy, tmp_path / "out", method=method))
        assert caught.value.exit_code == 79
    assert not (tmp_path / "out" / "run.json").exists()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_nan_in_a_weight_stops_the_run_and_leaves_no_adapter(tmp_path: Path) -> None:
    teacher = saved("llama", tmp_path / "t", seed=1)
    checkpoint = open_model(str(teacher)).checkpoint
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    broken = with_tensors(teacher, tmp_path / "broken", tensors)
    with pytest.raises(BadDataError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        distill(recipe_for(broken, saved("llama", tmp_path / "s", seed=2), tmp_path / "out"))
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "m")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CannotWriteError, match=r"thesis\.tex"):
        distill(recipe_for(model, saved("llama", tmp_path / "s", seed=3), tmp_path / "out"))


def test_a_tensor_without_a_role_is_named_and_refuses_nothing(tmp_path: Path) -> None:
    teacher, student, _ = planted_pair("llama", tmp_path)
    checkpoint = open_model(str(student)).checkpoint
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint} | {"model.mystery.weight": torch.ones(2, 2)}
    strange = with_tensors(student, tmp_path / "strange", tensors)
    adapter = distill(recipe_for(teacher, strange, tmp_path / "out", rank=2))
    record = json.loads((adapter.folder / "run.json").read_text())
    assert "the table of roles does not have it" in record["ignored_student_tensors"]["model.mystery.weight"]


def test_a_folder_without_a_manifest_is_no_adapter(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(finished[1], tmp_path / "copy")
    (copy / "run.json").unlink()
    with pytest.raises(MissingInputError, match="no finished adapter"):
        load_adapter(copy)


def test_a_custom_alpha_leaves_the_product_alone(tmp_path: Path) -> None:
    from peft import PeftModel

    teacher, student, _ = planted_pair("qwen3_moe", tmp_path)
    values = {"rank": "full", "head_rank": "full", "alpha": 48.0}
    adapter = distill(recipe_for(teacher, student, tmp_path / "out", **values))
    configuration = json.loads((adapter.folder / "adapter_config.json").read_text())
    assert configuration["lora_alpha"] == 48.0
    adapted = PeftModel.from_pretrained(load(student), str(adapter.folder))
    assert float((logits(adapted) - logits(load(teacher))).abs().max()) < 1e-3
    assert verify(adapter.folder).scale == pytest.approx(48.0 / configuration["r"])


def test_a_finished_adapter_of_another_pair_is_not_replaced_unasked(
    finished: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, out = finished
    copy = shutil.copytree(out, tmp_path / "copy")
    other = saved("qwen3_moe", tmp_path / "other", seed=9)
    (copy / "evaluation.json").write_text(json.dumps({"adapter_sha256": load_adapter(copy).sha256, "verdict": "old"}))
    (copy / "report.html").write_text("old")
    (copy / "training_curve.json").write_text("{}")
    before = (copy / "run.json").read_bytes()
    changed = recipe.model_copy(update={"output": copy, "teacher": str(other)})
    for judge in (distill, make_plan):
        with pytest.raises(CannotWriteError, match=r"holds a finished adapter of another teacher .*--force") as caught:
            judge(changed)
        assert caught.value.exit_code == 73
    assert (copy / "run.json").read_bytes() == before
    said: list[str] = []
    distill(changed, notes_to(said), force=True)
    assert not any((copy / name).exists() for name in ("evaluation.json", "report.html", "training_curve.json"))
    assert any("replaces the finished adapter" in note and str(other) in note for note in said)
    assert [note for note in said if note.startswith("deleted")] == [
        f"deleted {name}: it was of the adapter that lay here before"
        for name in ("evaluation.json", "report.html", "training_curve.json")
    ]


def test_another_setting_replaces_the_adapter_if_forced_and_says_so_and_the_same_bytes_keep_their_evaluation(
    finished: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, out = finished
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "evaluation.json").write_text(
        json.dumps({"adapter_sha256": load_adapter(copy).sha256, "verdict": "Helps."})
    )
    said: list[str] = []
    same = recipe.model_copy(update={"output": copy})
    distill(same, notes_to(said))
    assert (copy / "evaluation.json").exists()
    assert [note for note in said if note.startswith(("replaces", "deleted"))] == []
    assert not any(note.startswith("resuming") for note in said)
    assert any(note.startswith(f"{copy} holds the finished adapter of this recipe") for note in said)
    assert said[-1] == (
        "this recipe was finished already: the adapter is the same as before "
        f"(sha256 {json.loads((copy / 'run.json').read_text())['adapter_sha256']})"
    )
    said.clear()
    with pytest.raises(CannotWriteError, match=r"another rank \(found 4, expected 3\)"):
        distill(same.model_copy(update={"rank": 3}))
    assert (copy / "evaluation.json").exists()
    distill(same.model_copy(update={"rank": 3}), notes_to(said), force=True)
    assert any(note.startswith(f"resuming from {copy}: 4 finished parts") for note in said)
    assert not any("finished already" in note for note in said)
    assert any("rank 4 → 3" in note for note in said)
    assert not (copy / "evaluation.json").exists()


def test_a_damaged_record_of_an_earlier_run_does_not_stop_the_next(
    finished: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, out = finished
    for number, content in enumerate(("{", "[]", '{"recipe": 3}', '{"recipe": {"teacher": null}}')):
        copy = shutil.copytree(out, tmp_path / str(number))
        (copy / "run.json").write_text(content)
        assert judge_output(recipe.model_copy(update={"output": copy}), force=True) is not None
