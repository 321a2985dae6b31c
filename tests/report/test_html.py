"""The page about a run."""

from __future__ import annotations

import re

import pytest

from moe_svd_distill.report import facts, pictures
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.facts import training_note
from moe_svd_distill.report.html import html_report
from moe_svd_distill.report.record import RunRecord
from tests.support.pages import addresses
from tests.support.run_records import content, record, refinement, trained_record


def test_one_file_with_everything_in_it() -> None:
    page = html_report(record())
    found = addresses(page)
    assert len(found) == 6
    assert all(address.startswith("data:image/svg+xml;base64,") for address in found)
    assert not re.search(r"(src|href)\s*=\s*\"http|@import|url\(", page)
    assert page.index("Closes 34 %") < page.index("<h2>Figures</h2>")
    assert 'class="verdict good"' in page
    assert "/home/someone" not in page.split("<h2>Record</h2>")[0]


def test_text_from_outside_is_escaped() -> None:
    page = html_report(record(teacher={"source": "<script>alert(1)</script>"}))
    assert "<script>" not in page
    assert "attention 0.5 &lt;b&gt;" in page


@pytest.mark.parametrize("key", list(content()))
def test_any_part_may_be_absent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_file", lambda figure, kind: b"drawn")
    addresses(html_report(RunRecord.of({name: value for name, value in content().items() if name != key})))
    addresses(html_report(record(**{key: None})))


def test_an_empty_record() -> None:
    page = html_report(RunRecord.of({}))
    assert addresses(page) == []
    assert "has not been evaluated" in page


def test_the_same_record_gives_the_same_page() -> None:
    assert html_report(record()) == html_report(record())


def test_card_and_page_hold_the_note_and_the_headline_stays() -> None:
    made = trained_record()
    assert f"## Training\n\n{training_note(made)}\n" in adapter_card(made)
    page = html_report(made)
    assert f"<h2>Training</h2>\n<p>{training_note(made)}</p>" in page
    assert len(addresses(page)) == 7
    assert 'alt="Training loss and KL on calibration text by tokens trained on' in page
    assert facts.headline(made) == facts.headline(record())


def test_a_run_without_training_says_nothing_of_it() -> None:
    assert training_note(record()) == ""
    assert "## Training" not in adapter_card(record())
    assert "<h2>Training</h2>" not in html_report(record())


@pytest.mark.parametrize("key", list(refinement()))
def test_any_part_of_the_training_may_be_absent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_file", lambda figure, kind: b"drawn")
    for changed in ({name: value for name, value in refinement().items() if name != key}, refinement(**{key: None})):
        made = trained_record(refinement=changed)
        addresses(html_report(made))
        assert "## Training" in adapter_card(made)


def test_importing_the_report_draws_in_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, moe_svd_distill.report.html, moe_svd_distill.report.card, moe_svd_distill.report.pictures\n"
        "import moe_svd_distill.calibration.text, moe_svd_distill.evaluation.scale_search\n"
        "import moe_svd_distill.algebra.figures\n"
        "sys.exit(bool({'torch', 'matplotlib', 'jinja2', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
