"""What mkdocs calls for every page: marks become references, and links that lead out of the manual become text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import moe_svd_distill
from docs.generate.commands import command_reference, exit_codes
from docs.generate.recipe import presets, recipe_reference

DECISIONS = Path(__file__).parent.parent / "decisions"
_WITHOUT_KEYS = "    options:\n      members: [rank_of]"  # they have a page of their own
_MARK = re.compile(r"^<!-- generated: ([a-z ]+) -->$(?:\n.+)*", re.MULTILINE)  # and who reads the file is told below it
_OUT = re.compile(r"\[([^\]]*)\]\((?:\.\./)+(?!decisions/)[A-Z][^)]*\)")
_FOLDER = re.compile(r"\]\(([a-z./]+)/\)")


def decisions() -> str:
    """A link to each decision, by its first heading."""
    pages = sorted(DECISIONS.glob("[0-9]*.md"))
    return "\n".join(f"- [{_heading(page)}]({page.name})" for page in pages)


def public_functions() -> str:
    """What the package offers, for mkdocstrings to describe."""
    homes = {name: home.partition(":") for name, home in moe_svd_distill._HOMES.items()}
    places = {name: f"{module}.{attribute or name}" for name, (module, _, attribute) in homes.items()}
    named = [f"::: moe_svd_distill.{places[name]}" for name in moe_svd_distill.__all__ if name in places]
    return "\n\n".join(f"{name}\n{_WITHOUT_KEYS}" if name.endswith(".Recipe") else name for name in named)


GENERATED = {
    "recipe": recipe_reference,
    "presets": presets,
    "commands": command_reference,
    "exit codes": exit_codes,
    "decisions": decisions,
    "python": public_functions,
}


def expanded(markdown: str) -> str:
    """A page with its references in place of the marks.

    Raises:
        KeyError: A mark names no reference.
    """
    return _MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Of mkdocs: a page before it is rendered. Files beside the manual are not on the site: no links lead to them."""
    return expanded(_FOLDER.sub(r"](\1/index.md)", _OUT.sub(r"\1", markdown)))


def _heading(page: Path) -> str:
    return f"{page.name[:4]} {page.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# 0123456789.')}"
