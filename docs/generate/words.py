"""Pieces of Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence


def escaped(text: str) -> str:
    """Text of the program's, with what Markdown would take for its own made harmless."""
    return re.sub(r"([\\`*_{}\[\]])", r"\\\1", text).replace("<", "&lt;")


def code(value: object) -> str:
    """A value as it stands in a recipe."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a row of headings."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
