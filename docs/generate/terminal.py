"""The picture in README: ``python -m docs.generate.terminal`` runs the demo and draws what it prints."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import chdir
from html import unescape
from pathlib import Path

from rich.terminal_theme import TerminalTheme

from moe_svd_distill.cli import screen
from moe_svd_distill.cli.main import PROGRAM, main

PICTURE = Path(__file__).parent.parent / "pictures" / "demo.svg"
COLUMNS = 80
# The letters' contrast on their own ground is 12 and more, on a light page as on a dark one.
_THEME = TerminalTheme(
    (24, 26, 33),
    (226, 228, 233),
    [
        (24, 26, 33),
        (255, 132, 132),
        (130, 220, 150),
        (240, 210, 120),
        (130, 180, 255),
        (220, 160, 255),
        (120, 220, 230),
        (226, 228, 233),
    ],
)
_FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)  # from another machine
_SECONDS = re.compile(r"(?:&#160;)+\([\d.]+&#160;s\)")  # of a machine that may have been busy


def draw(picture: Path = PICTURE) -> None:
    """Run the demo and write the picture: what was printed, without the seconds."""
    with Path(os.devnull).open("w", encoding="utf-8") as nothing:
        console = type(screen.output)(record=True, width=COLUMNS, file=nothing, force_terminal=True)
        screen.output = console
        console.print(f"[bold]$[/] {PROGRAM} demo", highlight=False)
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            try:
                main(["demo"])
            except SystemExit as left:
                if left.code:
                    raise
        drawn = console.export_svg(title="demo", theme=_THEME, unique_id="demo")
    picture.write_text(without_seconds(_FONTS.sub("", drawn).replace("Fira Code, monospace", "monospace")), "utf-8")


def without_seconds(drawn: str) -> str:
    """With blanks in their place: a line keeps the length that the drawing gives it."""
    return _SECONDS.sub(lambda seconds: "&#160;" * len(unescape(seconds[0])), drawn)


if __name__ == "__main__":
    draw()
