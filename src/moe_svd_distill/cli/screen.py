"""What people see at the end: tables and lines that fit 80 columns, JSON for programs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_svd_distill.cli.main import PROGRAM


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a closed pipe to `main`; by default the program would end with code 1."""
        raise BrokenPipeError


console = _Console(stderr=True)
output = _Console()


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def grouped(reasons: Mapping[str, str]) -> Iterator[str]:
    """A line for each tensor and its reason; tensors that differ in one number only, such as experts, share one."""
    counts: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        pattern = re.sub(r"(?<=experts\.)\d+(?=\.)|(?<=\[)\d+(?=\])", "*", name)
        counts.setdefault((pattern, reason), []).append(name)
    for (pattern, reason), names in counts.items():
        yield f"{names[0]}: {reason}" if len(names) == 1 else f"{pattern} ({len(names)}): {reason}"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of figures: the first column is left-aligned and may be folded, the others right-aligned and whole."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        first = number == 0
        table.add_column(Text(column), justify="left" if first else "right", no_wrap=not first, overflow="fold")
    _print_titled(title, table, rows)


def print_facts(title: str, rows: Iterable[Sequence[str]]) -> None:
    """Names and what they are, in words that may take several lines."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(max_width=36, overflow="fold")
    table.add_column(overflow="fold")
    _print_titled(title, table, rows)


def _print_titled(title: str, table: Table, rows: Iterable[Sequence[str]]) -> None:
    for row in rows:
        table.add_row(*map(Text, row))
    if table.row_count:
        output.print(Text(f"\n{title}", style="bold"), soft_wrap=not output.is_terminal)
        output.print(table)


def print_line(text: str) -> None:
    """A line on standard output, broken between words where it is a terminal."""
    say(output, text)


def say(where: Console, text: str) -> None:
    """A line: on a terminal broken between words, as the terminal would break within them; elsewhere as it is."""
    where.print(text, soft_wrap=not where.is_terminal, highlight=False, markup=False)


def print_next(*words: str | Path, note: str = "", into: str = "") -> None:
    """The command that comes next, to be copied whatever its paths hold; words in capitals are left to fill in.

    On a terminal that it is too long for, a backslash ends a line as in a shell. What it prints goes to a file `into`.
    """
    lines = [f"Next{f', {note}' if note else ''}:"]
    for word in (PROGRAM, *map(shlex.quote, map(str, words)), *((f"> {shlex.quote(into)}",) if into else ())):
        if output.is_terminal and len(f"{lines[-1]} {word} \\") > output.width:
            lines[-1] += " \\" if len(lines) > 1 or PROGRAM in lines[-1] else ""
            lines.append(f"   {word}" if word != PROGRAM else f"  {word}")
        else:
            lines[-1] += f" {word}"
    output.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def roughly(seconds: float) -> str:
    """Seconds that are estimated, in words: no more digits than an estimate has."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else duration(600 * round(seconds / 600))
