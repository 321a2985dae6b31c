"""The tables of `evaluate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_svd_distill.cli.commands.evaluate import show
from moe_svd_distill.cli.main import main
from tests.report.samples import benchmarks, evaluation, figures, temperature_control


def test_controls_and_their_intervals_are_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    student = figures(0.513, 4.395) | {"kl_interval": {"low": 0.501, "high": 0.525}}
    control = {"seed": 7, "figures": figures(0.585, 4.47)}
    control["gap_closed"] = {"kl": -14.0, "cross_entropy": None, "kl_interval": {"low": -15.0, "high": -13.0}}
    shown = evaluation() | {"student": student, "controls": [control], "temperature_control": temperature_control()}
    show("adapter", shown | {"benchmarks": benchmarks()})
    printed = " ".join(capsys.readouterr().out.split())
    for cell in ("[0.501 … 0.525]", "+34.0 [+32.7 … +35.4]", "-14.0 [-15.0 … -13.0]", "+1.3 [+0.7 … +1.9]"):
        assert cell in printed
    assert "temperature 1.071 only*" in printed
    assert "*: fitted on half of the text and measured on the other half." in printed
    assert "+0.0310 ± 0.0110" in printed
    assert "at most 500 examples of each task" in printed


def test_benchmarks_alone_need_no_figures(capsys: pytest.CaptureFixture[str]) -> None:
    show("adapter", {"benchmarks": benchmarks()})
    printed = capsys.readouterr().out
    assert "arc_easy: acc" in printed
    assert "teacher" not in printed


@pytest.mark.parametrize("words", [["--benchmark-limit", "3"], ["--benchmark", " , "]])
def test_options_of_benchmarks_without_one_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(tmp_path), *words])
    assert left.value.code == 2
    assert "no benchmark is named" in capsys.readouterr().err
