"""The page about a run, and its pictures."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from moe_svd_distill.report import facts, pictures
from moe_svd_distill.report.html import html_report
from tests.report.samples import evaluation, record


class _Balance(HTMLParser):
    """Checks that every element is closed in order."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parsed(page: str) -> _Balance:
    balance = _Balance()
    balance.feed(page)
    assert balance.open == []
    return balance


def test_one_file_with_everything_in_it() -> None:
    page = html_report(record())
    addresses = _parsed(page).addresses
    assert len(addresses) == 6
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert not re.search(r"(src|href)\s*=\s*\"http|@import|url\(", page)
    assert page.index("Closes 34 %") < page.index("<h2>Figures</h2>")
    assert 'class="verdict good"' in page
    assert "/home/someone" not in page.split("<h2>Record</h2>")[0]


def test_text_from_outside_is_escaped() -> None:
    page = html_report(record(teacher={"source": "<script>alert(1)</script>"}))
    assert "<script>" not in page
    assert "attention 0.5 &lt;b&gt;" in page


@pytest.mark.parametrize("key", list(record()))
def test_any_part_may_be_absent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_file", lambda figure, kind: b"drawn")
    _parsed(html_report({name: value for name, value in record().items() if name != key}))
    _parsed(html_report(record(**{key: None})))


def test_an_empty_record() -> None:
    page = html_report({})
    assert _parsed(page).addresses == []
    assert "has not been evaluated" in page


def test_the_same_record_gives_the_same_page() -> None:
    assert html_report(record()) == html_report(record())


def test_means_over_experts_and_holes() -> None:
    found = facts.grid(record(), "relative_delta")
    assert found is not None
    assert found.layers == ("0", "1", "2", "ends")
    row = found.values[found.roles.index("experts.gate")]
    assert row[:3] == pytest.approx((0.4, 0.4, 0.4))
    assert row[3] is None
    assert found.values[found.roles.index("head")] == (None, None, None, 0.2)
    assert facts.grid(record(), "nothing") is None


def _pixels(content: bytes) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.asarray(Image.open(BytesIO(content)).convert("RGB"))


def _share(content: bytes, colour: tuple[int, int, int]) -> float:
    return float((np.abs(_pixels(content).astype(int) - colour).max(axis=-1) < 12).mean())


def test_bars_are_as_long_as_their_figures() -> None:
    blue, grey = (31, 111, 235), (125, 133, 144)
    drawn = pictures.figures_picture(evaluation(), kind="png")
    assert _share(drawn, blue) / _share(drawn, grey) == pytest.approx(0.339 / 0.513, rel=0.1)


def test_the_scale_curve_needs_something_tried() -> None:
    search = record()["scale_search"]
    assert pictures.scale_picture({}) is None
    assert pictures.scale_picture({"trials": search["trials"][:1]}) is None
    drawn = pictures.scale_picture(search, kind="png")
    assert drawn is not None
    assert _share(drawn, (207, 34, 46)) > 1e-4  # the note that the curve leaves the picture


@pytest.mark.parametrize("layers", [(1, 1), (3, 5), (48, 92)])
def test_depth_maps_of_any_size(layers: tuple[int, int]) -> None:
    edges = [(student, student * layers[1] // layers[0], 1.0) for student in range(layers[0])]
    assert _share(pictures.depth_picture(edges, layers, kind="png"), (45, 164, 78)) > 1e-4


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
