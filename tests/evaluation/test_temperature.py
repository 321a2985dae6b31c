"""One temperature on the student's logits, against dividing the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moe_svd_distill.evaluation.evaluate import evaluate_student
from moe_svd_distill.evaluation.from_states import compare
from moe_svd_distill.evaluation.sources import measure, record_teacher
from moe_svd_distill.evaluation.student import ResidentStudent
from moe_svd_distill.evaluation.temperature import HIGHEST, TemperatureCurve, TemperatureReader
from tests.support.language import Lab, llama, qwen3_moe


def _curve(student: Any, record: Any) -> TemperatureCurve:
    reader = TemperatureReader(record.units)
    return reader.curve(measure(student, record, readers=(reader,)))


@pytest.mark.parametrize("temperature", [0.26, 0.4, 0.9, 1.0, 1.07, 1.7, 3.9])
def test_the_curve_is_what_divided_logits_give(lab: Lab, temperature: float) -> None:
    teacher, student = qwen3_moe(320), llama(320)
    with torch.no_grad():
        for model in (teacher, student):
            model.lm_head.weight.mul_(40)  # logits as far apart as those of a trained model
    record = record_teacher(teacher, lab.text)
    found = _curve(student, record).at(temperature)
    with ResidentStudent(student).reading(lab.text, None, "student") as (blocks, logits):
        expected = compare(blocks, lambda states: logits(states) / temperature, record, "student")
    np.testing.assert_allclose(found.kl / found.tokens, expected.kl / expected.tokens, atol=2e-5)
    np.testing.assert_allclose(found.cross_entropy / found.tokens, expected.cross_entropy / expected.tokens, atol=2e-5)
    np.testing.assert_array_equal(found.agreement, expected.agreement)


def test_a_student_that_is_a_hotter_teacher_is_cooled_down_again(lab: Lab) -> None:
    teacher, student = qwen3_moe(320), qwen3_moe(320)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20)
        student.lm_head.weight.mul_(20 * 1.6)
    record = record_teacher(teacher, lab.text)
    curve = _curve(student, record)
    documents = np.arange(len(curve.untouched.tokens))
    assert curve.best(documents) == pytest.approx(1.6, rel=2e-3)
    assert curve.at(1.6).figures.kl < 1e-5
    lowest = curve.best(documents)
    assert all(curve.at(lowest * factor).kl.sum() > curve.at(lowest).kl.sum() for factor in (0.97, 1.03))


def test_what_lies_beyond_the_range_stands_at_its_edge(lab: Lab) -> None:
    teacher, student = qwen3_moe(320), qwen3_moe(320)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(5)
        student.lm_head.weight.mul_(5 * 10)
    record = record_teacher(teacher, lab.text)
    result = evaluate_student(ResidentStudent(student), [record], _nothing(lab, student))
    assert result.temperature_control is not None
    assert result.temperature_control.at_edge
    assert result.temperature_control.temperature == pytest.approx(HIGHEST, rel=0.01)


def test_an_adapter_that_only_cools_is_recalibration(lab: Lab, tmp_path: Any) -> None:
    """The adapter multiplies the head: all it does, one temperature does as well."""
    from peft import LoraConfig, get_peft_model

    teacher, student = llama(320, tie_word_embeddings=False), llama(320, tie_word_embeddings=False)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(30)
        student.lm_head.weight.mul_(30 * 1.5)
        teacher.model.layers[0].mlp.up_proj.weight.mul_(1.2)  # what no temperature reaches
    adapted = get_peft_model(student, LoraConfig(r=32, lora_alpha=32, target_modules=["lm_head"]))
    layer = adapted.base_model.model.lm_head
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(torch.eye(32))
        layer.lora_B.default.weight.copy_(layer.base_layer.weight * (1 / 1.5 - 1))
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    plain = adapted.unload()
    result = evaluate_student(ResidentStudent(plain), [record_teacher(teacher, lab.text)], tmp_path)
    control = result.temperature_control
    assert control is not None
    assert control.temperature == pytest.approx(1.5, rel=0.05)
    assert control.fitted_on == "half of the text"
    assert control.figures.documents < result.student.documents
    assert control.gap_closed.kl == pytest.approx(control.adapter_gap_closed.kl, abs=1)
    assert result.gap_closed.kl is not None
    assert result.gap_closed.kl > 50
    assert result.effect == "recalibrates"
    assert result.verdict.startswith("No more than recalibration: closes ")


def test_one_sequence_leaves_no_text_to_measure_on(lab: Lab) -> None:
    text = replace(lab.text, sequences=lab.text.sequences[:1], document_of_token=lab.text.document_of_token[:1])
    text = replace(text, sources=text.sources[: int(text.document_of_token.max()) + 1])
    student = llama(320)
    records = [record_teacher(qwen3_moe(320), text)]
    result = evaluate_student(ResidentStudent(student), records, _nothing(lab, student))
    assert result.temperature_control is None
    assert result.as_dict()["temperature_control"] is None


def _nothing(lab: Lab, student: Any) -> Any:
    """An adapter of the student's shape that changes nothing."""
    from peft import LoraConfig, get_peft_model

    folder = lab.student.parent / f"nothing-{student.config.model_type}"
    if not folder.is_dir():
        model = get_peft_model(student, LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj"]))
        model.save_pretrained(folder)
        model.unload()
    return folder
