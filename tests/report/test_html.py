"""The page about a run."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moe_svd_distill.report import facts, pictures
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.facts import training_note
from moe_svd_distill.report.html import html_report
from moe_svd_distill.report.record import RunRecord
from tests.support.pages import addresses
from tests.support.run_records import content, evaluation, record, refinement, trained_record


def test_one_file_with_everything_in_it() -> None:
    page = html_report(record())
    assert addresses(page) == []
    assert page.count('<svg role="img" aria-label="') == 6
    assert not re.search(r"(src|href)\s*=\s*\"http|@import|url\([^#]", page)
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', page)) <= set(identifiers)
    assert len(page) < 1_000_000
    assert page.index("Closes 34 %") < page.index("<table>") < page.index("<svg") < page.index("<h2>")
    assert 'class="verdict good"' in page
    assert "/home/someone" not in page.split("<h2>Record</h2>")[0]


def test_text_from_outside_is_escaped() -> None:
    page = html_report(record(teacher={"source": "<script>alert(1)</script>"}))
    assert "<script>" not in page
    assert "attention 0.5 &lt;b&gt;" in page


@pytest.mark.parametrize("key", list(content()))
def test_any_part_may_be_absent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_file", lambda figure, kind: b"<svg ></svg>")
    addresses(html_report(RunRecord.of({name: value for name, value in content().items() if name != key})))
    addresses(html_report(record(**{key: None})))


def test_an_empty_record() -> None:
    page = html_report(RunRecord.of({}))
    assert addresses(page) == []
    assert "has not been evaluated" in page


def test_both_schemes_are_declared_and_no_picture_brings_a_colour_of_its_own_for_lines_and_letters() -> None:
    page = html_report(record())
    assert '<meta name="color-scheme" content="light dark">' in page
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page
    assert "fill: #ffffff" not in page.split("<h2>What was done</h2>")[0]


def test_intervals_stand_under_their_figures() -> None:
    page = html_report(record())
    assert "<td>+34.0 %<small>+32.7 … +35.4</small></td>" in page
    first = page[page.index("<table>") : page.index("</table>")]
    assert first.count("<th ") == 5


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_file", lambda figure, kind: b"<svg ></svg>")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_reaches_over_the_screen(width: int, tmp_path: Path) -> None:
    page = html.escape(html_report(record()))
    frame = f'<iframe id="page" scrolling="no" style="width: {width}px" srcdoc="{page}"></iframe>'
    script = "page.onload = () => { document.title = page.contentDocument.documentElement.scrollWidth }"
    (tmp_path / "frame.html").write_text(f"<title></title>{frame}<script>{script}</script>")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    shown = subprocess.run(
        [*command, (tmp_path / "frame.html").as_uri()], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert f"<title>{width}</title>" in shown


@pytest.mark.usefixtures("undrawn")
def test_intervals_are_whole_and_commands_and_passages_are_set_as_code() -> None:
    page = html_report(record())
    assert re.search(r"td small \{[^}]*white-space: nowrap", page)
    assert re.search(r"\.prompt, \.written dd \{[^}]*monospace", page)
    assert "<code>moe-svd-distill evaluate OUT --benchmark humaneval --run-generated-code</code>" in page
    assert "`" not in page.split("<h2>Record</h2>")[0]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("size", "words"), [(2**30, "1.00 GiB"), (3 * 2**19, "1.5 MiB")])
def test_sizes_are_in_a_unit_that_fits(size: int, words: str) -> None:
    assert f"weights {words}<" in html_report(record(teacher={"source": "org/t", "bytes": size}))


def test_continuations_are_shown_escaped_and_what_was_not_written_with_its_reason() -> None:
    written = {"prompts": ["def f(<b>"], "texts": {"student": ["):\n  pass"], "adapted": ["x"]}}
    written["skipped"] = {"teacher": "it was streamed"}
    page = html_report(record(evaluation=evaluation() | {"continuations": written}))
    assert "def f(&lt;b&gt;" in page
    assert "<dt>student</dt><dd>):\n  pass</dd>" in page
    assert "<dt>with this adapter</dt><dd>x</dd>" in page
    assert "Not written by the teacher: it was streamed." in page
    assert "In its own words" not in html_report(record())


def test_the_fit_has_its_curve() -> None:
    page = html_report(record(calibration={"kl_by_pass": [0.5, 0.4, 0.41], "best_pass": 1}))
    assert 'aria-label="KL on calibration text after each pass' in page
    assert "<h2>Training</h2>" in page


def test_the_same_record_gives_the_same_page() -> None:
    assert html_report(record()) == html_report(record())


def test_card_and_page_hold_the_note_and_the_headline_stays() -> None:
    made = trained_record()
    assert f"## Training\n\n{training_note(made)}\n" in adapter_card(made)
    page = html_report(made)
    assert f"<h2>Training</h2>\n<p>{training_note(made)}</p>" in page
    assert page.count("<svg ") == 7
    assert 'aria-label="Training loss and KL on calibration text by tokens trained on' in page
    assert facts.headline(made) == facts.headline(record())


def test_a_run_without_training_says_nothing_of_it() -> None:
    assert training_note(record()) == ""
    assert "## Training" not in adapter_card(record())
    assert "<h2>Training</h2>" not in html_report(record())


@pytest.mark.parametrize("key", list(refinement()))
def test_any_part_of_the_training_may_be_absent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_file", lambda figure, kind: b"<svg ></svg>")
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
