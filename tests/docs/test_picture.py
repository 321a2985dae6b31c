"""The picture of the terminal in README: small, whole without the network, its figures those of the table beside it."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "pictures" / "demo.svg"
_LETTERS = re.compile(r'<text [^>]*y="([\d.]+)"[^>]*>(.*?)</text>')
_PERCENT = re.compile(r"[+-][\d.]+ %")


def _lines() -> list[str]:
    """What stands in the picture, line by line."""
    found: dict[str, str] = {}
    for height, text in _LETTERS.findall(PICTURE.read_text()):
        found[height] = found.get(height, "") + unescape(text).replace("\xa0", " ")
    return list(found.values())


def test_the_picture_is_small_and_fetches_nothing() -> None:
    drawn = PICTURE.read_text()
    assert len(drawn.encode()) < 60_000
    assert "url(http" not in drawn
    assert "@import" not in drawn
    assert "docs/pictures/demo.svg" in (ROOT / "README.md").read_text()


def test_the_figures_of_the_picture_are_those_of_the_tables() -> None:
    drawn = [_PERCENT.findall(line) for line in _lines() if line.startswith("with the adapter") and "%" in line]
    drawn = [figures for figures in drawn if figures]
    assert len(drawn) == 2
    for page in (ROOT / "README.md", ROOT / "docs" / "getting-started.md"):
        rows = [line for line in page.read_text().splitlines() if line.startswith(("| sibling:", "| independent:"))]
        assert [_PERCENT.findall(row) for row in rows] == drawn, page
