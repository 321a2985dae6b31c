"""What the manual holds: its pages, their blocks of code, what stands between back-ticks, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
RECORDS = ("benchmarks.md", "architecture.md", "head-formats.md")
WRONG_USES = "messages.md"  # generated, and compared by a test of its own
MANUAL = [*FRONT, *sorted(page for page in DOCS.glob("*.md") if page.name not in (*RECORDS, WRONG_USES))]
PAGES = [*FRONT, ROOT / "lab" / "README.md", *sorted(DOCS.rglob("*.md"))]

_BLOCK = re.compile(r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
_MARKED = re.compile(r"<!-- runnable(?P<slow>: slow)? -->\n```python\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+?)(?: \{ #([\w-]+) \})?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    code: str


def named(page: Path) -> str:
    """A page's name in messages."""
    return str(page.relative_to(ROOT))


def blocks(text: str, *languages: str) -> list[Block]:
    """Fenced blocks in one of the languages; all without."""
    found = [Block(match["language"], match["code"]) for match in _BLOCK.finditer(text)]
    return [block for block in found if not languages or block.language in languages]


def runnable(text: str) -> list[tuple[str, bool]]:
    """Python blocks that are marked as runnable, and whether that is slow."""
    return [(match["code"], bool(match["slow"])) for match in _MARKED.finditer(text)]


def prose(text: str) -> str:
    """Without the fenced blocks."""
    return _BLOCK.sub("", text)


def spans(text: str) -> list[str]:
    """What stands between back-ticks outside of blocks."""
    return _SPAN.findall(prose(text))


def links(text: str) -> list[str]:
    """Targets of links and pictures, those to other hosts left out."""
    found = _LINK.findall(_SPAN.sub("", prose(text)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> Iterator[str]:
    """What headings are reached by, as mkdocs and GitHub make it of their words."""
    for words, given in _HEADING.findall(prose(text)):
        if given:
            yield given
            continue
        kept = re.sub(r"[^\w\s-]", "", words.lower()).strip()
        yield re.sub(r"[-\s]+", "-", kept)
        yield kept.replace(" ", "-")
