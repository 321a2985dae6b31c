"""The trained baseline: what is trained, how the learning rate is found, and that a real PEFT adapter comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks._lora import (
    Training,
    adapter_targets,
    check_saved,
    learning_rate_factor,
    search,
    train,
    zero_start,
)
from benchmarks.lora_training import PAIRS, any_pair, line, outcome, table, texts, tokenized
from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.errors import BadDataError, IncompatiblePairError, UsageError
from moe_svd_distill.evaluation.from_states import TeacherRecord
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.evaluation.sources import measure, record_teacher
from tests.support.models import build, logits, saved

LENGTH = 32
TRAINING = Training(rank=4, step_tokens=4 * LENGTH)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _text(seed: int, sequences: int = 64) -> TokenizedText:
    ids = np.random.default_rng(seed).integers(0, 96, (sequences, LENGTH))
    owners = np.repeat(np.arange(sequences)[:, None], LENGTH, axis=1)
    return TokenizedText(ids, owners, tuple(map(str, range(sequences))), ())


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen3_moe", tmp_path_factory.mktemp("student"), seed=1)


@pytest.fixture(scope="module")
def records(student: Path) -> tuple[TeacherRecord, TeacherRecord]:
    teacher = build("qwen3_moe", seed=2, scale=6.0)
    return record_teacher(teacher, _text(0)), record_teacher(teacher, _text(1, 16))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral"])
def test_the_adapter_starts_at_zero_on_every_matrix_but_embeddings(model_type: str) -> None:
    model = build(model_type)
    expected = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2 and "embed" not in name}
    modules, parameters = adapter_targets(model)
    assert {f"{name}.weight" for name in modules} | set(parameters) == expected
    before = logits(model)
    peft_model = zero_start(model, rank=4, seed=3)
    assert torch.equal(logits(peft_model.get_base_model()), before)
    factors = {name: value for name, value in peft_model.named_parameters() if value.requires_grad}
    assert all(".lora_" in name for name in factors)
    assert sum(".lora_B." in name for name in factors) == len(expected)
    assert all(bool(value.any()) == (".lora_A." in name) for name, value in factors.items())


def test_an_adapter_that_peft_would_rewrite_is_refused() -> None:
    with pytest.raises(IncompatiblePairError, match="PEFT adapts 12 tensors of Glm4MoeForCausalLM, expected 18"):
        zero_start(build("glm4_moe"), rank=4, seed=3)


@pytest.mark.parametrize("steps", [1, 8, 64])
def test_the_learning_rate_rises_to_its_peak_and_never_reaches_zero(steps: int) -> None:
    factors = [learning_rate_factor(step, steps, 0.1) for step in range(steps)]
    peak = factors.index(max(factors))
    assert factors[peak] == 1.0
    assert peak == math.ceil(0.1 * steps) - 1
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert min(factors) > 0


def test_training_brings_the_student_nearer_and_leaves_its_own_weights_alone(
    student: Path, records: tuple[TeacherRecord, TeacherRecord]
) -> None:
    teacher, tuning = records
    run = train(student, teacher, 1e-2, replace(TRAINING, epochs=2))
    assert run.steps == 2 * len(teacher.text.sequences) // 4
    assert not run.diverged
    untouched = load_model(student)
    assert run.losses[0] == pytest.approx(measure(untouched, teacher).figures.kl, rel=0.1)
    model = run.peft_model.get_base_model()
    assert measure(model, tuning).figures.kl < 0.9 * measure(untouched, tuning).figures.kl
    restored = run.peft_model.unload().state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in untouched.state_dict().items())


def test_the_search_leaves_a_grid_that_is_too_low_and_keeps_the_best(
    student: Path, records: tuple[TeacherRecord, TeacherRecord]
) -> None:
    teacher, tuning = records
    found = search(student, teacher, tuning, TRAINING, grid=(1e-4, 3e-4))
    assert found.best.learning_rate > 3e-4
    assert found.tuning_kl[found.best.learning_rate] == min(found.tuning_kl.values())
    assert measure(found.best.peft_model.get_base_model(), tuning).figures.kl == pytest.approx(
        min(found.tuning_kl.values()), rel=1e-6
    )
    assert not found.at_edge


def test_divergence_is_no_result(student: Path, records: tuple[TeacherRecord, TeacherRecord]) -> None:
    teacher, tuning = records
    assert train(student, teacher, math.inf, TRAINING).diverged
    with pytest.raises(BadDataError, match="diverged with every"):
        search(student, teacher, tuning, TRAINING, grid=(math.inf,))
    with pytest.raises(UsageError, match="holds no sequence"):
        train(student, teacher, 1e-3, replace(TRAINING, step_tokens=LENGTH - 1))


def test_the_saved_adapter_is_the_trained_one(
    student: Path, records: tuple[TeacherRecord, TeacherRecord], tmp_path: Path
) -> None:
    teacher, tuning = records
    run = train(student, teacher, 1e-2, TRAINING)
    assert check_saved(run, student, tuning, tmp_path / "good") < 1e-5
    assert {file.name for file in (tmp_path / "good").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    other = train(student, teacher, 1e-4, TRAINING)

    class Mixed:
        def get_base_model(self) -> Any:
            return run.peft_model.get_base_model()

        def save_pretrained(self, *arguments: Any, **options: Any) -> None:
            other.peft_model.save_pretrained(*arguments, **options)

    with pytest.raises(BadDataError, match="another KL"):
        check_saved(replace(run, peft_model=Mixed()), student, tuning, tmp_path / "bad")


@pytest.mark.parametrize("name", PAIRS)
def test_no_document_serves_two_purposes_and_every_pair_exists(name: str) -> None:
    pair = any_pair(name)
    assert (pair.teacher / "config.json").is_file()
    assert (pair.student / "config.json").is_file()
    assert {"moe-to-dense": ("moe", "llama"), "dense-to-moe": ("llama", "moe")}.get(name, ("", "")) <= (
        pair.teacher.name,
        pair.student.name,
    )
    divided = texts(pair)
    parts = [{document.digest for document in part} for part in (divided.training, divided.tuning, divided.heldout)]
    assert sum(map(len, parts)) == len(set().union(*parts))
    sources = [{document.source for document in part} for part in (divided.training, divided.tuning, divided.heldout)]
    for purpose, known in zip(("training", "tuning", "heldout"), sources, strict=True):
        used = tokenized(pair, purpose, 8192).sources  # a section of a long document has its number behind a #
        assert {source if source in known else source.rpartition("#")[0] for source in used} <= known


def test_the_table_shows_what_was_measured(student: Path, records: tuple[TeacherRecord, TeacherRecord]) -> None:
    teacher, _ = records
    before = measure(load_model(student), teacher)
    values = outcome(before, before, teacher.measurement)
    assert values["gap_closed"]["kl"] == 0.0
    assert values["gap_closed"]["kl_interval"] == {"low": 0.0, "high": 0.0}
    row = {
        "pair": "pruned", "tokens": 8192, "training": {"seed": 0}, "learning_rate": 3e-3, "steps": 8,
        "learning_rate_at_edge": True, "training_seconds": 2.0, "search_seconds": 9.0, **values,
    }  # fmt: skip
    shown = table([row])
    assert shown.splitlines()[1] == line(row)
    assert "edge" in shown
    assert f"{before.figures.kl:.4f}" in shown
