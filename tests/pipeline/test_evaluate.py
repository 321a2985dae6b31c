"""What of an earlier evaluation stays beside a new one."""

from __future__ import annotations

import json
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.errors import MissingInputError, UsageError
from moe_svd_distill.evaluation import benchmarks, evaluate
from moe_svd_distill.evaluation.code import benchmark
from moe_svd_distill.evaluation.request import BenchmarkRequest, EvaluationRequest
from moe_svd_distill.evaluation.scale_search import ScaleDecision
from moe_svd_distill.files.names import EVALUATION_FILE
from moe_svd_distill.files.typed import as_json, read_as
from moe_svd_distill.pipeline.evaluate import evaluate as evaluate_adapter
from moe_svd_distill.pipeline.evaluate import few_sources, held_out
from moe_svd_distill.report.figures import text_note
from tests.support.models import saved
from tests.support.problems import GREEN, WRONG, write_problems

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
        lambda asked, *_: make_dataclass("Found", ["tasks", "limit"])(
            list(asked.benchmarks.harness), asked.benchmarks.limit
        ),
    )  # fmt: skip
    return folder


def _evaluate(folder: Path, texts: bool, request: BenchmarkRequest | None) -> dict[str, Any]:
    student = str(folder.parent / "student")
    named = (folder.parent / "text.txt",) if texts else ()
    result = evaluate_adapter(folder, named, teacher=student, student=student, benchmarks=request)
    content = dict(result.evaluation.content)
    assert json.loads((folder / EVALUATION_FILE).read_text()) == json.loads(json.dumps(content))
    return content


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

    def measured(asked: EvaluationRequest, problems: Any, student: Any, teacher: Any, on_progress: Any) -> Any:
        how = asked.benchmarks
        assert how is not None
        where = (student.folder, asked.adapter, asked.cache_folder, teacher)
        told.append((len(problems.problems), *where, how.new_tokens, how.batch))
        return make_dataclass("Measured", ["name"])(problems.name)

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

    def watched(asked: EvaluationRequest, *_: Any) -> Any:
        told["vocabulary"] = asked.vocabulary
        return SimpleNamespace(as_dict=lambda: {"verdict": "new"})

    monkeypatch.setattr(evaluate, "evaluate", watched)
    if recorded:
        (adapter / "run.json").write_text(json.dumps({"recipe": {"vocabulary": recorded}}))
    student = str(adapter.parent / "student")
    evaluate_adapter(adapter, [adapter.parent / "text.txt"], teacher=student, student=student, vocabulary=asked)
    assert told["vocabulary"] == expected


def _text(name: str, words: int = 60) -> str:
    return " ".join(f"{name}{n}" for n in range(words))


USED = Document("used", _text("used"), group="a")
SAME = Document("same", _text("same"), group="a")
COPY = Document("copy", _text("used", 50) + " and the end", group="b")
OTHER = Document("other", _text("other"), group="b")
USES = {"used_documents": [USED.digest], "used_groups": [USED.group_digest]}
SEARCH = read_as(ScaleDecision, USES)


def test_sections_of_few_sources_are_no_sample_of_others() -> None:
    sections = [Document(f"a:{number}", f"text {number}", origin="whole") for number in range(20)]
    assert list(few_sources(sections)) == [
        "20 documents or sections of 1 source: the intervals say nothing of other sources"
    ]
    alone = [Document(f"{number}", f"text {number}") for number in range(20)]
    assert list(few_sources(alone)) == list(few_sources(alone[:3])) == []


def test_documents_their_groups_and_what_repeats_them_are_left_out_and_counted() -> None:
    left, out = held_out([USED, SAME, COPY, OTHER], SEARCH, [USED])
    assert left == (OTHER,)
    assert (out.documents_used, out.documents_of_used_groups, out.documents_repeated) == (1, 1, 1)
    assert out.groups_apart


def test_without_the_text_it_was_made_of_repetitions_are_not_known() -> None:
    left, out = held_out([USED, SAME, COPY, OTHER], SEARCH, [])
    assert left == (COPY, OTHER)
    assert as_json(out)["documents_repeated"] is None


def test_where_nothing_else_is_left_other_documents_of_the_same_sources_are_read() -> None:
    left, out = held_out([USED, SAME], SEARCH, [USED])
    assert left == (SAME,)
    assert (out.documents_used, out.documents_of_used_groups, out.groups_apart) == (1, 0, False)


LINES = "".join(f"line {n}: " + " ".join(f"w{n}x{k}" for k in range(8)) + "\n" for n in range(30))


@pytest.mark.parametrize(
    "changed",
    [
        LINES.replace("\n", "\r\n"),
        LINES + "and a last line\n",
        LINES.rstrip("\n").rpartition("\n")[0],
        " ".join(LINES.split()),
        LINES.replace("line 7", "row 7").replace("w20x4", "edited"),
        LINES.upper().replace(":", " -"),
    ],
)
def test_text_that_differs_little_from_what_was_used_is_left_out_and_counted(changed: str) -> None:
    used = Document("calibration", LINES)
    search = read_as(ScaleDecision, {"used_documents": list(used.digests), "used_groups": [used.group_digest]})
    for others in ([], [OTHER], [OTHER, SAME]):
        left, out = held_out([*others, Document("changed", changed)], search, [used])
        assert left == tuple(others)
        assert out.documents_used + (out.documents_repeated or 0) == 1
        assert out.documents_of_used_groups == 0


def test_a_short_text_that_differs_in_punctuation_is_left_out_too() -> None:
    used = Document("calibration", "The cat sat on the mat.")
    search = read_as(ScaleDecision, {"used_documents": list(used.digests), "used_groups": [used.group_digest]})
    left, out = held_out([Document("a", "the cat sat\non the mat"), Document("b", "the cat sat")], search, [used])
    assert ([document.source for document in left], out.documents_repeated) == (["b"], 1)


def test_white_space_is_noticed_without_the_calibration_text() -> None:
    search = read_as(ScaleDecision, {"used_documents": list(Document("calibration", LINES).digests)})
    left, out = held_out([Document("changed", LINES.replace("\n", "\r\n").rstrip()), OTHER], search, [])
    assert (left, out.documents_used, out.documents_repeated) == ((OTHER,), 1, None)


def test_the_calibration_text_is_found_again_from_the_record(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the recipe gives shares and fields."""
    told: list[Any] = []
    monkeypatch.setattr(
        evaluate,
        "evaluate",
        lambda asked, teacher, student, documents, calibration, *_: (
            told.extend([documents, calibration]) or SimpleNamespace(as_dict=lambda: {"verdict": "new"})
        ),
    )
    folder = adapter.parent
    (folder / "a.jsonl").write_text(json.dumps({"body": LINES}))
    (folder / "b.jsonl").write_text(json.dumps({"text": OTHER.text}))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in (LINES + "\nmore", SAME.text)))
    calibration = [{"path": str(folder / "a.jsonl"), "share": 0.3, "field": "body"}, str(folder / "b.jsonl")]
    used = list(Document("x", LINES).digests)
    content = {"recipe": {"calibration": calibration}, "scale_search": {"used_documents": used}}
    (adapter / "run.json").write_text(json.dumps(content))
    student = str(folder / "student")
    result = evaluate_adapter(adapter, [folder / "text.jsonl"], teacher=student, student=student)
    assert [document.text for document in told[0]] == [SAME.text]
    assert [document.text for document in told[1]] == [LINES, OTHER.text]
    assert result.evaluation.held_out.documents_repeated == 1
    assert result.evaluation.held_out.read["documents"] == 2


def test_an_adapter_without_a_record_and_text_that_is_all_used() -> None:
    assert held_out([USED, OTHER], read_as(ScaleDecision, {}), [])[0] == (USED, OTHER)
    assert held_out([USED], SEARCH, [])[0] == ()


@pytest.mark.parametrize("same", [False, True])
def test_the_verdict_and_the_note_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    told: list[Any] = []

    def measured(asked: Any, teacher: Any, student: Any, documents: Any, *_: Any) -> Any:
        told.extend(documents)
        return SimpleNamespace(as_dict=lambda: {"verdict": "It helps.", "adapted": {"tokens": 7}})

    monkeypatch.setattr(evaluate, "evaluate", measured)
    student = str(saved("llama", tmp_path / "student"))
    rows = [{"text": SAME.text, "site": "a"}, {"text": USED.text, "site": "a"}]
    rows += [] if same else [{"text": OTHER.text, "site": "b"}]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "adapter").mkdir()
    record = {"recipe": {"text_group": "site"}, "scale_search": USES}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(record))
    text = str(tmp_path / "text.jsonl")
    evaluation = evaluate_adapter(str(tmp_path / "adapter"), [text], teacher=student, student=student).evaluation
    assert [document.text for document in told] == [SAME.text if same else OTHER.text]
    assert evaluation.held_out.groups_apart != same
    assert ("larger than on other sources" in evaluation.verdict) == same
    expected = "of the sources it was made on" if same else "1 documents left out that it was made on, 1 of the same"
    assert expected in text_note(evaluation)
