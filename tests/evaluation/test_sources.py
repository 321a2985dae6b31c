"""Figures of models in memory, against the models' own logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from moe_svd_distill.calibration.text import TokenizedText, tokenize
from moe_svd_distill.errors import BadDataError, IncompatiblePairError, MissingInputError, UsageError
from moe_svd_distill.evaluation import from_states, loading
from moe_svd_distill.evaluation.loading import load_model, model_bytes
from moe_svd_distill.evaluation.sources import measure, record_teacher
from tests.support import architectures
from tests.support.language import LENGTH, Lab, llama, qwen3_moe


def _naive(teacher: Any, student: Any, text: TokenizedText, vocabulary: int) -> tuple[float, float, float, float]:
    ids = torch.from_numpy(text.sequences)
    with torch.no_grad():
        of_teacher = teacher(input_ids=ids).logits[:, :-1, :vocabulary].log_softmax(-1)
        of_student = student(input_ids=ids).logits[:, :-1, :vocabulary].log_softmax(-1)
    kl = (of_teacher.exp() * (of_teacher - of_student)).sum(-1).mean().item()
    agreement = (of_teacher.argmax(-1) == of_student.argmax(-1)).float().mean().item()
    entropies = [-scores.gather(-1, ids[:, 1:, None]).mean().item() for scores in (of_teacher, of_student)]
    return kl, entropies[0], entropies[1], agreement


@pytest.mark.parametrize("pair", ["llama", "llama-scaled", "mixed", "padded", "capped", "wrapper"])
def test_figures_are_those_of_the_models_own_logits(lab: Lab, pair: str) -> None:
    vocabulary = 320 if pair != "padded" else 300
    teacher, student = {
        "llama": lambda: (load_model(lab.teacher), load_model(lab.student)),
        "llama-scaled": lambda: (_granite(), llama(320)),
        "mixed": lambda: (qwen3_moe(320), llama(320)),
        "padded": lambda: (qwen3_moe(384), llama(320)),
        "capped": lambda: [architectures.build(name, vocab_size=320) for name in ("nanochat", "gemma2")],
        "wrapper": lambda: [architectures.build(name, vocab_size=320) for name in ("llama4", "mistral3")],
    }[pair]()
    text = lab.text
    if pair == "padded":
        text = dataclasses.replace(text, sequences=np.minimum(text.sequences, vocabulary - 1))
    record = record_teacher(teacher, text, vocabulary=vocabulary)
    figures = measure(student, record).figures
    kl, teacher_entropy, entropy, agreement = _naive(teacher, student, text, vocabulary)
    assert figures.kl == pytest.approx(kl, rel=1e-4)
    assert figures.cross_entropy == pytest.approx(entropy, rel=1e-5)
    assert figures.top1_agreement == pytest.approx(agreement, abs=1e-6)
    assert record.measurement.figures.cross_entropy == pytest.approx(teacher_entropy, rel=1e-5)
    assert figures.tokens == text.predicted


def _granite() -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(4)
    return GraniteForCausalLM(GraniteConfig(vocab_size=320, logits_scaling=4.0, **fields)).eval()


def test_a_model_measured_against_itself_has_no_gap(lab: Lab) -> None:
    model = qwen3_moe(320)
    figures = measure(model, record_teacher(model, lab.text)).figures
    assert figures.kl < 1e-6
    assert figures.top1_agreement == 1.0


def test_half_precision_is_near(lab: Lab) -> None:
    teacher, student = load_model(lab.teacher), load_model(lab.student)
    exact = measure(student, record_teacher(teacher, lab.text)).figures
    coarse = measure(student.bfloat16(), record_teacher(teacher.bfloat16(), lab.text)).figures
    assert coarse.kl == pytest.approx(exact.kl, rel=0.01)
    assert coarse.cross_entropy == pytest.approx(exact.cross_entropy, rel=0.01)


def test_progress_is_told(lab: Lab) -> None:
    told: list[tuple[str, int, int]] = []
    record_teacher(llama(320), lab.text, on_progress=lambda *step: told.append(step))
    assert told[0] == ("teacher", 0, lab.text.tokens)
    assert told[-1] == ("teacher", lab.text.tokens, lab.text.tokens)


def test_an_unknown_step_after_the_head_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(320)
    forward = type(model).forward

    def changed(self: Any, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        output.logits = output.logits * 3 + 1
        return output

    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(IncompatiblePairError, match="does something to its logits"):
        record_teacher(model, lab.text)


def test_a_student_with_fewer_tokens_is_refused(lab: Lab) -> None:
    record = record_teacher(llama(384), lab.text)
    with pytest.raises(IncompatiblePairError, match="320 tokens, fewer than the 384"):
        measure(llama(320), record)


def test_not_a_number_is_an_error(lab: Lab) -> None:
    record = record_teacher(llama(320), lab.text)
    broken = llama(320)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(BadDataError, match="not finite"):
        measure(broken, record)


def test_a_model_that_does_not_fit_is_refused_before_loading(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = sum(parameter.numel() for parameter in load_model(lab.student).parameters())
    assert model_bytes(lab.student, 4) == pytest.approx(4 * parameters, rel=0.1)
    assert model_bytes(lab.student, 2) == pytest.approx(2 * parameters, rel=0.1)
    monkeypatch.setattr(loading, "available_bytes", lambda device: 1000)
    with pytest.raises(UsageError, match=r"takes 0\.0 GiB as float32 and cpu has 0\.0 GiB free"):
        load_model(lab.student)


def test_a_folder_without_a_model(tmp_path: Any) -> None:
    with pytest.raises(MissingInputError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    with pytest.raises(BadDataError, match="cannot be loaded"):
        load_model(tmp_path)


def test_a_single_sequence_is_enough(lab: Lab) -> None:
    from moe_svd_distill.calibration.tokenizer import load_tokenizer

    text = tokenize(lab.documents[:2], load_tokenizer(lab.student), LENGTH, length=LENGTH)
    figures = measure(llama(320), record_teacher(llama(320), text)).figures
    assert figures.tokens == LENGTH - 1
    assert figures.documents == 1


def test_the_logits_of_few_tokens_exist_at_a_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = qwen3_moe(320), llama(320)
    expected = measure(student, record_teacher(teacher, lab.text))
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def watched(states: Any, weight: Any, bias: Any = None) -> Any:
        result = linear(states, weight, bias)
        if weight.shape[0] == 320:
            seen.append(result.numel() * 4)
        return result

    monkeypatch.setattr(from_states, "LOGIT_BYTES", 20_000)
    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    found = measure(student, record_teacher(teacher, lab.text))
    model_probe = 16 * 320 * 4
    assert max(size for size in seen if size != model_probe) <= 20_000
    assert len(seen) > 3 * lab.text.predicted * 320 * 4 / 20_000
    np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-5)
    np.testing.assert_allclose(found.cross_entropy, expected.cross_entropy, rtol=1e-5)
