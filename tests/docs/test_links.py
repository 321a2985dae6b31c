"""Links of the manual lead somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.generate.hook import expanded
from tests.docs.pages import DOCS, PAGES, ROOT, anchors, links, named


def faults(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere, and anchors that are not there."""
    found = []
    for target in links(text):
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        if not place.exists() or not place.is_relative_to(ROOT):
            found.append(f"{target}: not there")
        elif anchor and anchor not in set(anchors(_read(place) if name else text)):
            found.append(f"{target}: no such heading")
    return found


def _read(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return expanded(text) if page.is_relative_to(DOCS) else text


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    assert faults(page, _read(page)) == []


@pytest.mark.parametrize(
    "link", ["[a](nowhere.md)", "[a](recipe.md#tokns)", "[a](#nothing)", "![a](pictures/none.svg)"]
)
def test_a_link_to_nowhere_is_found(link: str) -> None:
    assert len(faults(DOCS / "text.md", f"# Text\n{link}")) == 1
