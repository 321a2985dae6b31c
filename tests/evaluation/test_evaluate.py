"""The whole evaluation on the pair whose truth is known."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_svd_distill.calibration.documents import Document, without
from moe_svd_distill.errors import BadDataError, IncompatiblePairError, UsageError
from moe_svd_distill.evaluation.evaluate import evaluate
from moe_svd_distill.evaluation.request import EvaluationRequest
from moe_svd_distill.files.names import ADAPTER_FILE
from tests.support.language import LENGTH, Lab, documents, llama, write_tokenizer


def test_the_adapter_that_makes_the_teacher_closes_the_gap(lab: Lab) -> None:
    passes: list[str] = []
    request = EvaluationRequest(lab.good_adapter, length=LENGTH, controls=2)

    def told(name: str, done: int, total: int) -> None:
        if done == 0:
            passes.append(name)

    result = evaluate(request, lab.teacher, lab.student, documents(40, seed=9), on_progress=told)
    assert passes == ["teacher", "student", "adapter", "control", "control"]
    assert result.effect == "helps"
    assert result.gap_closed.kl == pytest.approx(100, abs=0.1)
    assert result.gap_closed.cross_entropy == pytest.approx(100, abs=0.1)
    assert result.control_gap_closed is not None
    assert result.control_gap_closed.kl is not None
    assert result.control_gap_closed.kl < 0
    assert result.teacher.cross_entropy < result.student.cross_entropy - 1
    assert result.verdict.startswith("Closes 100.0 % of the KL gap ")
    assert result.verdict.count("%") <= 2
    assert result.verdict.count(". ") == 0
    read_back = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert read_back["adapted"]["perplexity"] == pytest.approx(read_back["teacher"]["perplexity"], rel=1e-3)
    assert all(control["figures"]["perplexity"] > 1 for control in read_back["controls"])
    assert read_back["control_gap_closed"]["kl"] == result.control_gap_closed.kl


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_models_compute_in_the_type_that_is_asked_for_and_in_float32_on_a_cpu_if_none_is(
    lab: Lab, mode: Literal["resident", "streamed"], tmp_path: Path
) -> None:
    request = EvaluationRequest(lab.good_adapter, length=LENGTH, controls=0, tokens=1000, mode=mode, cache=tmp_path)
    text = documents(20, seed=9)
    whole, same, narrow = (
        evaluate(replace(request, dtype=dtype), lab.teacher, lab.student, text)
        for dtype in ("auto", "float32", "bfloat16")
    )
    assert whole.dtypes == same.dtypes == dict.fromkeys(("teacher", "student"), "float32")
    assert (whole.student, whole.adapted) == (same.student, same.adapted)
    assert narrow.dtypes == dict.fromkeys(("teacher", "student"), "bfloat16")
    assert narrow.student.kl != whole.student.kl
    assert narrow.student.kl == pytest.approx(whole.student.kl, rel=0.02)
    assert narrow.as_dict()["dtypes"] == narrow.dtypes
    with pytest.raises(UsageError, match="expected auto, float32 or bfloat16"):
        replace(request, dtype="float8")


def test_a_random_adapter_is_called_harmful(lab: Lab) -> None:
    request = EvaluationRequest(lab.random_adapter, length=LENGTH, controls=0)
    result = evaluate(request, lab.teacher, lab.student, documents(40, seed=9))
    assert result.effect == "harms"
    assert result.verdict.startswith("Harms the student: KL ")
    assert result.control_gap_closed is None


def test_text_that_was_used_before_is_left_out(lab: Lab) -> None:
    used = {document.digest for document in lab.documents}
    with pytest.raises(BadDataError, match="All of the text was used"):
        evaluate(EvaluationRequest(lab.good_adapter), lab.teacher, lab.student, without(lab.documents, used))


def test_an_adapter_scaled_to_nothing_changes_nothing(lab: Lab, tmp_path: Path) -> None:
    shutil.copy(lab.good_adapter / "adapter_config.json", tmp_path)
    tensors = load_file(lab.good_adapter / ADAPTER_FILE)
    zeros = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}
    save_file(zeros, tmp_path / ADAPTER_FILE)
    request = EvaluationRequest(tmp_path, tokens=1024, length=LENGTH)
    result = evaluate(request, lab.teacher, lab.student, documents(10, seed=9))
    assert result.effect == "none"
    assert result.adapted == result.student == result.controls[0].figures
    assert result.verdict.startswith("The adapter changes nothing: nothing was transferred (KL ")


def test_an_adapter_whose_names_cannot_be_read_is_refused_before_any_pass(lab: Lab, tmp_path: Path) -> None:
    tensors = load_file(lab.good_adapter / ADAPTER_FILE)
    save_file({name.replace("q_proj", "z_proj"): tensor for name, tensor in tensors.items()}, tmp_path / ADAPTER_FILE)
    shutil.copy(lab.good_adapter / "adapter_config.json", tmp_path)
    passes: list[str] = []
    with pytest.raises(BadDataError, match="z_proj"):
        evaluate(
            EvaluationRequest(tmp_path, length=LENGTH),
            lab.teacher,
            lab.student,
            lab.documents,
            on_progress=lambda name, done, total: passes.append(name),
        )
    assert passes == []


def test_another_vocabulary_is_refused_before_anything_runs(lab: Lab, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["a wholly other text to learn from"] * 3)
    with pytest.raises(IncompatiblePairError, match="different vocabularies"):
        evaluate(EvaluationRequest(lab.good_adapter), tmp_path, lab.student, [Document("a", "text")])


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_saved_whole_has_its_random_control(lab: Lab, tmp_path: Path, tied: bool) -> None:
    """Its noise is around the student's own head, wherever the student lies that the adapter names."""
    student, adapter = tmp_path / "student", tmp_path / "adapter"
    llama(320, tie_word_embeddings=tied).save_pretrained(student)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lab.student / name, student / name)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(student),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    )
    with torch.no_grad():
        head = model.get_base_model().lm_head.modules_to_save["default"].weight
        head.add_(0.5 * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(adapter, save_embedding_layers=False)
    configuration = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(configuration | {"base_model_name_or_path": "no/where"}))

    resident = EvaluationRequest(adapter, length=LENGTH, controls=2, mode="resident", tokens=1000)
    requests = (resident, replace(resident, controls=1, mode="streamed"))
    found = [evaluate(request, lab.teacher, student, documents(20, seed=9)) for request in requests]
    one, other = (control.figures for control in found[0].controls)
    assert abs(one.kl - found[0].student.kl) > 1e-3
    assert one.kl != other.kl
    assert found[0].student.kl == pytest.approx(found[1].student.kl, rel=1e-3)
    assert found[0].controls[0].figures.kl == pytest.approx(found[1].controls[0].figures.kl, rel=1e-3)
    assert found[0].adapted.kl == pytest.approx(found[1].adapted.kl, rel=1e-3)
