"""What of an earlier evaluation stays beside a new one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_svd_distill.errors import MissingInputError, UsageError
from moe_svd_distill.evaluation import benchmarks, evaluate
from moe_svd_distill.evaluation.code import benchmark
from moe_svd_distill.files.names import EVALUATION_FILE
from moe_svd_distill.pipeline.evaluate import BenchmarkRequest, evaluate_adapter
from tests.evaluation.code.problems import GREEN, WRONG, write_problems
from tests.support.models import saved

REQUEST = BenchmarkRequest(("task",), limit=7, include_path=Path("tasks"))


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an adapter's bytes; measuring is left to others."""
    student = saved("llama", tmp_path / "student")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(student)}))
    (folder / "adapter_model.safetensors").write_bytes(b"one")
    (tmp_path / "text.txt").write_text("some words")
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: SimpleNamespace(as_dict=lambda: {"verdict": "new"}))
    monkeypatch.setattr(benchmarks, "version", lambda name: "0.4.13")
    monkeypatch.setattr(
        benchmarks, "run_benchmarks",
        lambda *where, **how: SimpleNamespace(as_dict=lambda: {"tasks": list(where[2]), "limit": how["limit"]}),
    )  # fmt: skip
    return folder


def _evaluate(folder: Path, texts: bool, request: BenchmarkRequest | None) -> dict[str, Any]:
    student = str(folder.parent / "student")
    named = [folder.parent / "text.txt"] if texts else []
    result = evaluate_adapter(folder, student, student, named, benchmarks=request)
    assert json.loads((folder / EVALUATION_FILE).read_text()) == json.loads(json.dumps(result.evaluation))
    return result.evaluation


def test_text_and_benchmarks_do_not_overwrite_one_another(adapter: Path) -> None:
    assert "benchmarks" not in _evaluate(adapter, True, None)
    both = _evaluate(adapter, False, REQUEST)
    assert both["verdict"] == "new"
    assert both["benchmarks"] == {"tasks": ["task"], "limit": 7}
    assert _evaluate(adapter, True, None) == both


def test_figures_of_other_bytes_are_dropped(adapter: Path) -> None:
    _evaluate(adapter, True, REQUEST)
    (adapter / "adapter_model.safetensors").write_bytes(b"another")
    assert "verdict" not in _evaluate(adapter, False, REQUEST)
    assert "benchmarks" in _evaluate(adapter, False, REQUEST)


def test_nothing_to_do_and_no_harness_are_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no text to evaluate on"):
        _evaluate(adapter, False, None)
    monkeypatch.setattr(benchmarks, "version", lambda name: "0.4.9")
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("measured before the refusal"))
    with pytest.raises(MissingInputError, match=r"found lm-eval 0\.4\.9"):
        _evaluate(adapter, True, REQUEST)


def test_programming_problems_need_consent_and_stay_beside_the_rest(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_problems(tmp_path / "own.jsonl", GREEN, WRONG)
    code = BenchmarkRequest((f"humaneval:{file}",), new_tokens=5, batch=2)
    with pytest.raises(UsageError, match=r"runs programs that the models write.*Add --run-generated-code"):
        _evaluate(adapter, False, code)
    told: list[Any] = []

    def measured(problems: Any, student: Any, folder: Path, kept: Path, **how: Any) -> Any:
        told.append((len(problems.problems), student.folder, folder, kept, how["teacher"], how["limit"], how["batch"]))
        return SimpleNamespace(name=problems.name, as_dict=lambda: {"name": problems.name})

    monkeypatch.setattr(benchmark, "run_code_benchmark", measured)
    allowed = replace(code, run_generated_code=True, limit=1)
    both = _evaluate(adapter, True, replace(allowed, tasks=(*allowed.tasks, "task")))
    assert told == [(1, tmp_path / "student", adapter, adapter / "cache", None, 5, 2)]
    assert both["benchmarks"]["tasks"] == ["task"]
    assert both["code_benchmarks"] == {"humaneval:own.jsonl": {"name": "humaneval:own.jsonl"}}
    assert _evaluate(adapter, False, REQUEST)["code_benchmarks"] == both["code_benchmarks"]
    other = write_problems(tmp_path / "other.jsonl", GREEN)
    again = _evaluate(adapter, False, replace(allowed, tasks=(f"humaneval:{other}",), teacher=True))
    assert set(again["code_benchmarks"]) == {"humaneval:own.jsonl", "humaneval:other.jsonl"}
    assert (again["verdict"], again["benchmarks"]) == (both["verdict"], both["benchmarks"] | {"limit": 7})
    assert told[-1][4].folder == tmp_path / "student"


@pytest.mark.parametrize(("asked", "recorded", "expected"), [
    (None, None, "equal"), (None, "shared", "shared"), ("equal", "shared", "equal"), ("shared", "equal", "shared"),
])  # fmt: skip
def test_vocabulary_is_what_is_asked_for_or_what_the_run_had(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, recorded: str | None, expected: str
) -> None:
    told: dict[str, Any] = {}

    def watched(*_: Any, **how: Any) -> Any:
        told.update(how)
        return SimpleNamespace(as_dict=lambda: {"verdict": "new"})

    monkeypatch.setattr(evaluate, "evaluate", watched)
    if recorded:
        (adapter / "run.json").write_text(json.dumps({"recipe": {"vocabulary": recorded}}))
    student = str(adapter.parent / "student")
    evaluate_adapter(adapter, student, student, [adapter.parent / "text.txt"], vocabulary=asked)
    assert told["vocabulary"] == expected
