"""Continuations of held-out text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from moe_svd_distill.evaluation.continuations import NEW_TOKENS, Continuations
from moe_svd_distill.evaluation.evaluate import evaluate
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.evaluation.request import EvaluationRequest
from tests.support.language import LENGTH, Lab, documents


def test_the_adapted_student_writes_what_the_teacher_writes(lab: Lab) -> None:
    request = EvaluationRequest(lab.good_adapter, length=LENGTH, controls=0)
    found = evaluate(request, lab.teacher, lab.student, documents(40, seed=9)).continuations
    assert len(found.prompts) == 3
    assert found.texts.keys() == {"text", "teacher", "student", "adapted"}
    assert all(len(texts) == 3 and all(texts) for texts in found.texts.values())
    assert found.texts["adapted"] == found.texts["teacher"] != found.texts["student"]
    assert not found.skipped


def test_models_that_are_streamed_write_nothing_and_that_is_said(lab: Lab, tmp_path: Path) -> None:
    request = EvaluationRequest(lab.good_adapter, length=LENGTH, controls=0, mode="streamed", cache=tmp_path)
    result = evaluate(request, lab.teacher, lab.student, documents(40, seed=9))
    assert result.continuations.texts.keys() == {"text"}
    assert result.continuations.skipped.keys() == {"teacher", "student", "adapted"}
    kept = json.loads(json.dumps(result.as_dict()))["continuations"]
    assert "layer by layer" in kept["skipped"]["teacher"]


def test_they_are_greedy_and_as_transformers_writes_them(lab: Lab) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = load_model(lab.student), AutoTokenizer.from_pretrained(lab.student)
    found = Continuations.of(lab.text, lab.student).by("student", model, lab.student)
    read = tokenizer(found.prompts[0], return_tensors="pt")
    written = model.generate(**read, max_new_tokens=NEW_TOKENS, do_sample=False)[0, read["input_ids"].shape[1] :]
    assert found.texts["student"][0] == tokenizer.decode(written, skip_special_tokens=True)


def test_a_model_without_a_tokenizer_that_transformers_reads_is_named(lab: Lab, tmp_path: Path) -> None:
    bare = shutil.copytree(lab.student, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "no tokenizer" in Continuations.of(lab.text, bare).skipped["teacher"]
    found = Continuations.of(lab.text, lab.student).by("teacher", None, bare)
    assert "no tokenizer" in found.skipped["teacher"]
