"""Messages that the troubleshooting page explains are the program's own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT

HEADINGS = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


def said(file: Path) -> list[str]:
    """Every text of a module, with … for what is filled in."""
    texts = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            texts.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


@pytest.fixture(scope="module")
def all_texts() -> str:
    return "\n".join(text for file in sorted((ROOT / "src").rglob("*.py")) for text in said(file))


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_message_that_is_explained_is_the_programs(heading: str, all_texts: str) -> None:
    pieces = [re.escape(piece.strip(" ")) for piece in heading.split("…") if piece.strip(" .:")]
    assert re.search(r"[^\n]*?".join(pieces), all_texts), heading
