"""From problems to a result, with a student and an adapter; and a run that was killed within."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.code import benchmark, writing
from moe_svd_distill.evaluation.code.benchmark import LocalModel, run_code_benchmark
from moe_svd_distill.evaluation.code.problems import ProblemSet, load_problems
from moe_svd_distill.evaluation.request import BenchmarkRequest, EvaluationRequest
from moe_svd_distill.files.names import ADAPTER_FILE
from tests.support.language import Lab
from tests.support.problems import GREEN, WRONG, write_problems


@pytest.fixture
def problems(tmp_path: Path) -> ProblemSet:
    return load_problems(f"humaneval:{write_problems(tmp_path / 'own.jsonl', GREEN, WRONG)}")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, list[str]]]:
    """What was continued, by whom (with an adapter or not); the adapted student stops at once."""
    seen: list[tuple[bool, list[str]]] = []
    plain = writing.Writer.continue_texts

    def watched(self: writing.Writer, prompts: list[str], limit: int) -> list[writing.Continuation]:
        adapted = any("lora" in name for name, _ in self._model.named_modules())
        seen.append((adapted, list(prompts)))
        found = plain(self, prompts, limit)
        return [writing.Continuation("", 1, "end") for _ in found] if adapted else found

    monkeypatch.setattr(writing.Writer, "continue_texts", watched)
    return seen


def _run(lab: Lab, problems: ProblemSet, kept: Path, **options: Any) -> benchmark.CodeBenchmark:
    how = {"new_tokens": options.pop("limit", 5), "batch": options.pop("batch", 1)}
    request = EvaluationRequest(lab.good_adapter, benchmarks=BenchmarkRequest(("humaneval",), **how), cache=kept)
    return run_code_benchmark(request, problems, LocalModel(lab.student, "student"), **options)


def test_gained_and_lost_are_paired_over_problems(
    lab: Lab, problems: ProblemSet, tmp_path: Path, written: list[Any]
) -> None:
    told: list[tuple[str, int, int]] = []
    found = _run(
        lab, problems, tmp_path / "kept", batch=2, teacher=LocalModel(lab.teacher, "teacher"),
        on_progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert [adapted for adapted, _ in written] == [False, True, False]
    assert found.student.pass_at_1 == 0.0
    assert found.student.reasons == {"SyntaxError": 2}
    assert found.student.unfinished == 2
    assert (found.adapted.passed, found.adapted.reasons, found.adapted.unfinished) == (
        ("own/0",), {"AssertionError": 1}, 0
    )  # fmt: skip
    assert (found.gained, found.lost) == (("own/0",), ())
    assert found.change.change == 0.5
    assert found.teacher is not None
    assert ("humaneval:own.jsonl: adapted writes", 2, 2) in told
    assert ("humaneval:own.jsonl: teacher is run", 1, 2) in told
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["gained"] == ["own/0"]


def test_a_killed_run_goes_on_with_the_next_batch(
    lab: Lab, problems: ProblemSet, tmp_path: Path, written: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    write = writing.CompletionFile.write

    def killed(self: writing.CompletionFile, done: Any) -> None:
        write(self, done)
        if self.depends_on["adapter"] and len(done) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.CompletionFile, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            _run(lab, problems, kept)
    assert [adapted for adapted, _ in written] == [False, False, True]
    (first,) = written[-1][1]
    written.clear()
    resumed = _run(lab, problems, kept)
    assert [adapted for adapted, _ in written] == [True]
    assert written[0][1] != [first]
    assert resumed == _run(lab, problems, tmp_path / "afresh")
    written.clear()
    assert resumed == _run(lab, problems, kept)
    assert written == []


@pytest.mark.parametrize("change", ["limit", "batch", "student", "adapter", "problems"])
def test_completions_of_something_else_are_not_taken(
    change: str, lab: Lab, problems: ProblemSet, tmp_path: Path, written: list[Any]
) -> None:
    kept, adapter = tmp_path / "kept", tmp_path / "adapter"
    shutil.copytree(lab.good_adapter, adapter)

    def run(student: str = "student", limit: int = 5, batch: int = 2, problems: ProblemSet = problems) -> None:
        asked = BenchmarkRequest(("humaneval",), new_tokens=limit, batch=batch)
        request = EvaluationRequest(adapter, benchmarks=asked, cache=kept)
        run_code_benchmark(request, problems, LocalModel(lab.student, student))

    run()
    written.clear()
    match change:
        case "limit":
            run(limit=6)
        case "batch":
            run(batch=1)
        case "student":
            run(student="another")
        case "adapter":
            shutil.copy(lab.random_adapter / ADAPTER_FILE, adapter / ADAPTER_FILE)
            run()
        case "problems":
            other = write_problems(tmp_path / "other.jsonl", GREEN, {**WRONG, "prompt": "def color():\n"})
            run(problems=load_problems(f"humaneval:{other}"))
    assert {adapted for adapted, _ in written} == ({True} if change == "adapter" else {False, True})


def test_a_damaged_file_is_named(lab: Lab, problems: ProblemSet, tmp_path: Path, written: list[Any]) -> None:
    _run(lab, problems, tmp_path)
    for file in tmp_path.glob("completions-*"):
        file.write_text(file.read_text()[:-9])
    with pytest.raises(BadDataError, match=r"completions-.* is damaged"):
        _run(lab, problems, tmp_path)
