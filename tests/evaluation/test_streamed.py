"""Figures of models that are read layer by layer, against those of the same models in memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.calibration.text import tokenize
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.errors import UsageError
from moe_svd_distill.evaluation import evaluate as evaluation
from moe_svd_distill.evaluation import loading, sources, student
from moe_svd_distill.evaluation.evaluate import evaluate
from moe_svd_distill.evaluation.request import EvaluationRequest
from moe_svd_distill.evaluation.result import Evaluation
from moe_svd_distill.evaluation.sources import PredictingRows, streamed_records
from tests.support.language import LENGTH, Lab, documents, llama, qwen3_moe
from tests.support.passes import a_journal_of_every_layer
from tests.support.tiny import random_pairs, save_adapter


@dataclass(frozen=True)
class Pair:
    """A pair of one architecture, and an adapter on everything the student has."""

    teacher: Path
    student: Path
    adapter: Path


@pytest.fixture(scope="module", params=["dense", "experts"])
def pair(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    make = llama if request.param == "dense" else qwen3_moe
    for name, seed in (("teacher", 1), ("student", 2)):
        model = make(320, tie_word_embeddings=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.ndim > 1:
                    tensor.add_(0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)).mul_(3)
        model.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(lab.student / file, folder / name)
    pairs = random_pairs(folder / "student", dtype=torch.float32)
    save_adapter(folder / "adapter", folder / "student", pairs)
    return Pair(folder / "teacher", folder / "student", folder / "adapter")


def _evaluate(pair: Pair, mode: Any, cache: Path, **changes: Any) -> Evaluation:
    calibration = changes.pop("calibration", documents(12, seed=21))
    told = changes.pop("on_progress", None)
    request = EvaluationRequest(pair.adapter, length=LENGTH, mode=mode, cache=cache, **changes)
    return evaluate(request, pair.teacher, pair.student, documents(24, seed=9), calibration, told)


def test_figures_are_those_of_models_in_memory(pair: Pair, tmp_path: Path) -> None:
    resident, streamed = _evaluate(pair, "resident", tmp_path / "none"), _evaluate(pair, "streamed", tmp_path / "cache")
    assert not (tmp_path / "none").exists()
    assert resident.places == {"teacher": "resident", "student": "resident"}
    assert streamed.places == {"teacher": "streamed", "student": "streamed"}
    assert resident.temperature_control is not None
    assert resident.temperature_control.fitted_on == "calibration text"
    assert abs(resident.student.kl - resident.adapted.kl) > 1e-3
    for one, other in zip(_numbers(resident), _numbers(streamed), strict=True):
        assert other == pytest.approx(one, rel=2e-4, abs=2e-5)


def _numbers(result: Evaluation) -> list[float]:
    assert result.temperature_control is not None
    everyone = [result.teacher, result.student, result.adapted, result.temperature_control.figures]
    everyone += [control.figures for control in result.controls]
    assert len(everyone) == 5
    return [
        value
        for figures in everyone
        for value in (figures.kl, figures.cross_entropy, figures.top1_agreement, figures.kl_error)
    ] + [result.temperature_control.temperature]


def test_states_of_teacher_and_student_are_kept_and_used_again(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _evaluate(pair, "streamed", tmp_path)
    assert sorted(map(str, tmp_path.iterdir())) == sorted(first.kept_states)
    assert len(first.kept_states) == 2
    assert json.loads(json.dumps(first.as_dict()))["kept_states"] == list(first.kept_states)
    passes: list[Any] = []
    stream = sources.stream_states

    def watched(*arguments: Any, **options: Any) -> Any:
        states = stream(*arguments, **options)
        passes.append((options["adapter"] is not None if "adapter" in options else False, states.record))
        return states

    for module in (sources, student):
        monkeypatch.setattr(module, "stream_states", watched)
    again = _evaluate(pair, "streamed", tmp_path)
    assert [(adapted, record.layers_computed) for adapted, record in passes] == [
        (False, 0),
        (False, 0),
        (True, 2),
        (True, 2),
    ]
    assert again.adapted == first.adapted
    assert again.student == first.student


def test_a_stopped_evaluation_goes_on(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    computed: list[tuple[str, int]] = []

    def stop(name: str, done: int, total: int) -> None:
        if name == "adapter, layer by layer" and done >= total / 2:
            raise StoppedError

    with a_journal_of_every_layer(), pytest.raises(StoppedError):
        _evaluate(pair, "streamed", tmp_path, on_progress=stop)
    stream = sources.stream_states

    def watched(*arguments: Any, **options: Any) -> Any:
        states = stream(*arguments, **options)
        computed.append((str(options.get("adapter") and options["adapter"].folder.name), states.record.layers_computed))
        return states

    for module in (sources, student):
        monkeypatch.setattr(module, "stream_states", watched)
    result = _evaluate(pair, "streamed", tmp_path)
    assert [layers for _, layers in computed][:2] == [0, 0]
    assert computed[2][0] == "adapter"
    assert computed[2][1] < 2
    assert sorted(map(str, tmp_path.iterdir())) == sorted(result.kept_states)


def test_each_model_is_streamed_only_where_it_does_not_fit(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loading, "_needed_bytes", lambda folder, dtype: 2**62 if Path(folder).name == "teacher" else 1000
    )
    result = _evaluate(pair, "auto", tmp_path, controls=0)
    assert result.places == {"teacher": "streamed", "student": "resident"}
    with pytest.raises(UsageError, match="--mode streamed"):
        _evaluate(pair, "resident", tmp_path)


def test_the_cache_lies_in_the_adapters_folder(pair: Pair, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(pair.adapter, adapter)
    request = EvaluationRequest(adapter, length=LENGTH, controls=0, mode="streamed", tokens=512)
    evaluate(request, pair.teacher, pair.student, documents(10, seed=9))
    assert len(list((adapter / "cache").iterdir())) == 2


def test_rows_of_a_text_are_found_among_all(pair: Pair, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pair.student)
    texts = [tokenize(documents(4, seed=seed), tokenizer, length=LENGTH) for seed in (1, 2)]
    read = [PairedText.read_alike(text, 320) for text in texts]
    together = streamed_records(pair.teacher, read, tmp_path / "both", "cpu")
    alone = streamed_records(pair.teacher, read[1:], tmp_path / "one", "cpu")[0]
    hidden = together[1].hidden
    assert isinstance(hidden, PredictingRows)
    assert hidden.shape == (len(texts[1].sequences), LENGTH - 1, 32)
    torch.testing.assert_close(hidden[0:3], alone.hidden[0:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden[torch.tensor([2, 0])], hidden[slice(None)][[2, 0]])
    assert len(hidden[5:5]) == 0
    assert together[1].measurement.figures.cross_entropy == pytest.approx(alone.measurement.figures.cross_entropy)


def test_text_of_another_domain_is_named(pair: Pair, tmp_path: Path) -> None:
    other = tuple(Document(f"other-{n}", " ".join(f"{n + 7 * k}-{k * k + n}" for k in range(90))) for n in range(24))
    near = _evaluate(pair, "resident", tmp_path, controls=0)
    far = _evaluate(pair, "resident", tmp_path, controls=0, calibration=other)
    assert near.domain is not None
    assert not near.domain.different
    assert far.domain is not None
    assert far.domain.different
    assert far.verdict.endswith("Calibrated on text of another domain.")
    assert "another domain" not in near.verdict


def test_too_little_calibration_text_falls_back_to_half(pair: Pair, tmp_path: Path) -> None:
    result = _evaluate(pair, "resident", tmp_path, controls=0, calibration=(Document("short", "red green"),))
    assert result.temperature_control is not None
    assert result.temperature_control.fitted_on == "half of the text"
    assert result.domain is None
    assert evaluation.FIT_TOKENS > LENGTH
