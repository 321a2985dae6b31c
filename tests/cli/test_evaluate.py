"""The tables of `evaluate`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.cli import screen
from moe_svd_distill.cli.evaluation import show as show_record
from moe_svd_distill.cli.main import main
from moe_svd_distill.files.typed import read_as
from moe_svd_distill.report.record import EvaluationRecord
from tests.support.problems import GREEN, write_problems
from tests.support.run_records import benchmarks, code_benchmarks, evaluation, figures, temperature_control


def show(title: str, content: dict[str, Any]) -> None:
    show_record(title, read_as(EvaluationRecord, content))


def test_controls_and_their_intervals_are_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    student = figures(0.513, 4.395) | {"kl_interval": {"low": 0.501, "high": 0.525}}
    control = {"seed": 7, "figures": figures(0.585, 4.47)}
    control["gap_closed"] = {"kl": -14.0, "cross_entropy": None, "kl_interval": {"low": -15.0, "high": -13.0}}
    shown = evaluation() | {"student": student, "controls": [control], "temperature_control": temperature_control()}
    show("adapter", shown | {"benchmarks": benchmarks()})
    lines = capsys.readouterr().out.splitlines()
    printed = " ".join(" ".join(lines).split())
    for cell in ("0.501 … 0.525", "+34.0 %", "+32.7 … +35.4", "-14.0 %", "-15.0 … -13.0", "+0.7 … +1.9"):
        assert cell in printed
    assert "temperature 1.071*" in printed
    assert "fitted on half of the text and measured on the other half." in printed
    assert "+0.0310 ± 0.0110" in printed
    assert "at most 500 examples of each task" in printed
    assert max(len(line) for line in lines[: lines.index("") + 20] if "  " in line) <= 80


def test_benchmarks_alone_need_no_figures(capsys: pytest.CaptureFixture[str]) -> None:
    show("adapter", {"benchmarks": benchmarks()})
    printed = capsys.readouterr().out
    assert "arc_easy: acc" in printed
    assert "teacher" not in printed


def test_programming_problems_have_a_table_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    show("adapter", {"code_benchmarks": code_benchmarks()})
    printed = " ".join(capsys.readouterr().out.split())
    assert "adapter: pass@1" in printed
    assert "humaneval 164 0.3049 0.3171 +0.0122 -0.0271 … +0.0541 0.6098" in printed
    assert "5 problems gained and 3 lost" in printed


@pytest.mark.parametrize("consent", [False, True])
def test_generated_code_is_run_only_if_the_user_asks_for_it(
    consent: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_problems(tmp_path / "own.jsonl", GREEN)
    words = ["--run-generated-code"] if consent else []
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path), "--student", "x", "--benchmark", f"humaneval:{file}", *words])
    said = capsys.readouterr().err
    assert ("Add --run-generated-code" in said) != consent
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [["--benchmark-limit", "3"], ["--benchmark", " , "], ["--run-generated-code"]])
def test_options_of_benchmarks_without_one_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(tmp_path), *words])
    assert left.value.code == 2
    assert "no benchmark is named" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_of_a_table_is_folded(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(screen, "output", screen._Console(file=stream, width=width))
    intervals = {
        "kl_interval": {"low": 0.5011, "high": 0.5249},
        "cross_entropy_interval": {"low": 14.31, "high": 14.45},
    }
    gap = {"kl": -134.0, "kl_interval": {"low": -132.7, "high": -135.4}, "cross_entropy": 1.0}
    gap |= {"cross_entropy_interval": {"low": -132.7, "high": -135.4}}
    shown = evaluation() | {"adapted": figures(0.5, 14.4) | intervals, "gap_closed": gap}
    show("a folder", shown | {"temperature_control": temperature_control(), "code_benchmarks": code_benchmarks()})
    text = stream.getvalue()
    for row in ("with the adapter  ", "temperature 1.071*  ", "random, seed 7  ", "humaneval  "):
        assert f"\n{row}" in text
    assert "-132.7 … -135.4  -132.7 … -135.4" in text
    ends = [line for line in text.splitlines() if "  " in line and not line.startswith(("KL", "humaneval:"))]
    assert max(map(len, ends)) <= width
