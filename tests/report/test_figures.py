"""Figures with their controls and intervals, and benchmarks, on the card and on the page."""

from __future__ import annotations

import pytest

from moe_svd_distill.files.typed import read_as
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.figures import figure_rows
from moe_svd_distill.report.html import html_report
from moe_svd_distill.report.record import EvaluationRecord
from tests.support.run_records import benchmarks, evaluation, figures, record, temperature_control


@pytest.mark.parametrize("write", [adapter_card, html_report])
def test_temperature_and_benchmarks_are_shown(write: object) -> None:
    assert callable(write)
    full = evaluation() | {"temperature_control": temperature_control(), "benchmarks": benchmarks()}
    page = write(record(evaluation=full | {"domain": {"different": True}}))
    assert "temperature: one temperature on the student" in page.replace("&#39;", "'")
    page = page.replace("<small>", " (").replace("</small>", ")").replace("\xa0", " ")
    assert "+1.3 % (+0.7 … +1.9)" in page
    assert "fitted on half of the text and measured on the rest" in page
    assert "calibrated on text of another domain" in page
    assert "arc_easy, acc" in page
    assert "0.2820 (± 0.0200)" in page
    assert "+0.0310 (± 0.0110)" in page
    assert "at most 500 examples of each task" in page
    plain = write(record())
    assert "temperature" not in plain
    assert "lm-evaluation-harness" not in plain
    assert "another domain" not in plain


@pytest.mark.parametrize("write", [adapter_card, html_report])
def test_benchmarks_alone_are_figures_too(write: object) -> None:
    assert callable(write)
    page = write(record(evaluation={"benchmarks": benchmarks()}))
    assert "arc_easy, acc" in page
    assert "random change" not in page
    assert "Not evaluated on held-out text" in page


def test_intervals_of_the_figures_themselves_are_shown() -> None:
    student = figures(0.513, 4.395) | {"kl_interval": {"low": 0.501, "high": 0.525}, "cross_entropy_interval": None}
    row = figure_rows(read_as(EvaluationRecord, evaluation() | {"student": student}))[0]
    assert str(row[1]) == "0.5130 (0.501 … 0.525)"
    assert str(row[2]) == "4.3950 (± 0.0500)"
