"""All rows as one Markdown table, one figure a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.real_pair.rows import Row, names

_GIB = 2**30


def table(rows: Path) -> str:
    """The table of all rows; cells of what was not measured are empty."""
    found = {name: Row(rows / name).read() for name in names(rows)}
    kinds = [kind for kind in ("heldout", "prose") if any(_figures(row, kind) for row in found.values())]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "student": lambda row: str(row["row"]["inputs"].get("student_folder", "")),
        "seconds": lambda row: _number(row["row"]["cost"]["seconds"], ",.0f"),
        "CPU seconds": lambda row: _number(row["row"]["cost"]["cpu_seconds"], ",.0f"),
        "peak memory, GiB": lambda row: _number(row["row"]["cost"]["peak_bytes"] / _GIB, ".2f"),
        "written, GiB": lambda row: _number(row["row"]["cost"]["written_bytes"] / _GIB, ".2f"),
    }
    for kind in kinds:
        for field, (title, digits) in _FIGURES.items():
            columns[f"{kind}: {title}"] = _figure(kind, field, "value", digits)
            if field.endswith("gap_closed"):
                columns[f"{kind}: {title}, low"] = _figure(kind, field, "low", digits)
                columns[f"{kind}: {title}, high"] = _figure(kind, field, "high", digits)
    if any("tasks" in row for row in found.values()):
        for title, (path, digits) in _TASKS.items():
            columns[title] = _task(path, digits)
    lines = [["row", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(cell(row) for cell in columns.values())] for name, row in found.items() if "row" in row]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


_FIGURES = {
    "student_kl": ("KL before", ".4f"),
    "kl": ("KL after", ".4f"),
    "kl_gap_closed": ("KL gap closed, %", "+.1f"),
    "student_cross_entropy": ("CE before", ".4f"),
    "cross_entropy": ("CE after", ".4f"),
    "teacher_cross_entropy": ("CE of the teacher", ".4f"),
    "cross_entropy_gap_closed": ("CE gap closed, %", "+.1f"),
    "student_agreement": ("top-1 agreement before, %", ".1f"),
    "agreement": ("top-1 agreement after, %", ".1f"),
}

_TASKS = {
    "pass@1 before": (("student", "pass_at_1"), ".4f"),
    "pass@1 after": (("adapted", "pass_at_1"), ".4f"),
    "pass@1 of the teacher": (("teacher", "pass_at_1"), ".4f"),
    "change": (("change", "change"), "+.4f"),
    "change, low": (("change", "low"), "+.4f"),
    "change, high": (("change", "high"), "+.4f"),
}


def _figure(kind: str, field: str, part: str, digits: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        return _number((_figures(row, kind).get(field) or {}).get(part), digits)

    return cell


def _task(path: tuple[str, str], digits: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        result = (row.get("tasks") or {}).get("result") or {}
        return _number((result.get(path[0]) or {}).get(path[1]), digits)

    return cell


def _figures(row: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return ((row.get("measured") or {}).get("figures") or {}).get(kind) or {}


def _number(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)
