"""The hand-over to the lm-evaluation-harness: a task of one's own, on a student and a real adapter."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.errors import BadDataError, MissingInputError, UsageError
from moe_svd_distill.evaluation import benchmarks
from moe_svd_distill.evaluation.benchmarks import EXTRA, require_harness, run_benchmarks
from moe_svd_distill.evaluation.loading import AdaptedStudent, load_model
from moe_svd_distill.evaluation.request import BenchmarkRequest, EvaluationRequest
from tests.support.language import Lab


@pytest.fixture
def task_folder(tmp_path: Path, lab: Lab) -> Path:
    """A multiple-choice task with local data: which word follows in the lab's language."""
    texts = [document.text.split() for document in lab.documents]
    pairs = {pair for words in texts for pair in pairwise(words)}
    rows = []
    for words in texts[:24]:
        wrong = sorted(word for word in {*words} if (words[19], word) not in pairs)[:3]
        choices = [f" {word}" for word in (words[20], *wrong)]
        rows.append({"context": " ".join(words[:20]), "choices": choices, "label": 0})
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "next_word.yaml").write_text(
        f"""task: next_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "rows.json"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3
"""
    )
    return tmp_path


def _asked(lab: Lab, task: str = "next_word", **how: Any) -> EvaluationRequest:
    return EvaluationRequest(lab.good_adapter, benchmarks=BenchmarkRequest((task,), **how))


def _accuracy(model: Any, lab: Lab, task_folder: Path, limit: int = 20) -> float:
    """The share of examples whose first choice is the likeliest, from the model's own logits."""
    tokenizer = load_tokenizer(lab.student)

    def score(context: str, choice: str) -> float:
        begin, ids = (len(tokenizer.encode([context])[0]), torch.tensor(tokenizer.encode([context + choice])))
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(scores.gather(-1, ids[0, 1:, None])[begin - 1 :].sum())

    rows = [json.loads(line) for line in (task_folder / "rows.json").read_text().splitlines()[:limit]]
    scores = np.array([[score(row["context"], choice) for choice in row["choices"]] for row in rows])
    return float((scores.argmax(1) == 0).mean())


@pytest.mark.slow
def test_student_and_adapter_side_by_side(
    lab: Lab, task_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(task_folder / "home"))
    stages: list[str] = []
    asked = _asked(lab, limit=20, include_path=task_folder)
    found = run_benchmarks(asked, lab.student, lambda name, done, total: stages.append(name))
    assert stages == ["benchmarks: student", "benchmarks: adapter"]
    assert capsys.readouterr().out == ""
    (score,) = [score for score in found.scores if score.metric == "acc"]
    assert (score.task, score.examples, score.higher_is_better, found.limit) == ("next_word", 20, True, 20)
    assert found.tasks["next_word"]["version"] == 3
    assert score.student == _accuracy(load_model(lab.student), lab, task_folder)
    adapted = AdaptedStudent.load(load_model(lab.student), lab.good_adapter)
    assert score.adapted == _accuracy(adapted.model, lab, task_folder)
    assert score.student != score.adapted
    assert score.change == pytest.approx(score.adapted - score.student)
    assert score.student_error is not None
    assert score.change_error is not None
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["scores"][0]["task"] == "next_word"
    with pytest.raises(UsageError, match="knows no task nowhere"):
        run_benchmarks(_asked(lab, "nowhere", include_path=task_folder), lab.student)


def _result(values: list[float], **changes: Any) -> dict[str, Any]:
    samples = [{"doc_id": n, "acc": value, "filter": "none"} for n, value in enumerate(values)]
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)
    result: dict[str, Any] = {
        "results": {"t": {"alias": "t", "acc,none": mean, "acc_stderr,none": error}},
        "samples": {"t": samples},
        "versions": {"t": 1},
        "n-shot": {"t": 0},
        "n-samples": {"t": {"effective": len(values)}},
        "higher_is_better": {"t": {"acc": True}},
    }
    return result | changes


def test_the_error_of_a_change_is_paired(rng: np.random.Generator) -> None:
    before = (rng.random(400) < 0.5).astype(float)
    after = before.copy()
    after[:8] = 1 - after[:8]
    (score,) = benchmarks._scores(_result(list(before)), _result(list(after)))
    assert score.student_error is not None
    assert score.change_error == pytest.approx(np.std(after - before, ddof=1) / 20)
    assert score.change_error < score.student_error / 3
    (alone,) = benchmarks._scores(_result(list(before), samples={}), _result(list(after)))
    assert alone.change_error is None
    mismatched = _result(list(after))
    mismatched["results"]["t"]["acc,none"] += 0.2  # a metric that is no mean over examples
    assert benchmarks._scores(_result(list(before)), mismatched)[0].change_error is None


def test_an_error_that_the_harness_does_not_give_is_nothing() -> None:
    result = _result([1.0, 0.0])
    result["results"]["t"]["acc_stderr,none"] = "N/A"
    (score,) = benchmarks._scores(result, result)
    assert score.student_error is None


@pytest.mark.parametrize("installed", [None, "0.4.9.1"])
def test_a_missing_or_old_harness_is_refused_with_the_name_of_the_extra(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(benchmarks, "version", version)
    with pytest.raises(MissingInputError) as refused:
        run_benchmarks(_asked(lab), lab.student)
    assert f"pip install '{EXTRA}'" in str(refused.value)
    assert f"found lm-eval {installed or 'none'}, expected at least 0.4.10" in str(refused.value)
    monkeypatch.setattr(benchmarks, "version", lambda name: "0.4.10")
    assert require_harness() == "0.4.10"


def test_what_cannot_work_is_refused_before_a_model_is_loaded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "version", lambda name: "0.4.13")
    with pytest.raises(MissingInputError, match="is not a folder"):
        run_benchmarks(_asked(lab, include_path=Path("/nowhere")), lab.student)
    with pytest.raises(UsageError, match="no benchmark is named"):
        run_benchmarks(EvaluationRequest(lab.good_adapter), lab.student)
    with pytest.raises(MissingInputError):
        run_benchmarks(replace(_asked(lab), adapter=Path("/nowhere")), lab.student)
    monkeypatch.setattr(benchmarks, "require_memory", lambda *_: (_ for _ in ()).throw(UsageError("too large", "x")))
    with pytest.raises(UsageError, match="too large"):
        run_benchmarks(_asked(lab), lab.student)


def test_a_failing_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    def fail(**_: Any) -> None:
        raise KeyError("no such column\nand a long story")

    monkeypatch.setitem(sys.modules, "lm_eval", types.SimpleNamespace(simple_evaluate=fail))
    asked = BenchmarkRequest(("a", "b"))
    with pytest.raises(BadDataError, match=r"failed on a, b \(KeyError: 'no such column"):
        benchmarks._run({}, EvaluationRequest(Path()), asked, None)
