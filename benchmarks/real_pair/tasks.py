"""Programming problems of a row, by the product's `evaluate --benchmark humaneval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.real_pair.cost import run_measured
from benchmarks.real_pair.places import Places
from benchmarks.real_pair.rows import Row, file_digest, model_digest


def tasks(places: Places, row: Row, benchmark: str, limit: int | None, tokens: int, teacher: bool) -> dict[str, Any]:
    """Let the product run the problems, unless that is there. Runs generated code, under limits.

    Args:
        places: The cache; completions of student and teacher are shared by all rows.
        row: Whose adapter.
        benchmark: `humaneval`, or `humaneval:FILE`.
        limit: The first so many problems; None for all.
        tokens: Of each program at most.
        teacher: Whether the teacher is given them as well.
    """
    inputs = {
        "benchmark": benchmark,
        "limit": limit,
        "tokens": tokens,
        "asked_teacher": teacher,
        "student": model_digest(places.student),
        "teacher": model_digest(places.teacher) if teacher else None,
        "adapter": file_digest(row.adapter / "adapter_model.safetensors"),
    }

    def make() -> dict[str, Any]:
        command = [
            sys.executable, "-m", "moe_svd_distill", "evaluate", str(row.adapter),
            "--student", str(places.student), "--teacher", str(places.teacher),
            "--benchmark", benchmark, "--benchmark-tokens", str(tokens), "--run-generated-code",
            "--cache", str(places.root / "completions"),
            *(["--benchmark-limit", str(limit)] if limit else []),
            *(["--benchmark-teacher"] if teacher else []),
        ]  # fmt: skip
        cost = run_measured(command, row.folder / "tasks-log.txt")
        evaluation = json.loads((row.adapter / "evaluation.json").read_text(encoding="utf-8"))
        kind, colon, file = benchmark.partition(":")
        found = evaluation["code_benchmarks"][f"{kind}:{Path(file).name}" if colon else kind]
        return {"cost": cost, "result": found}

    return row.section("tasks", inputs, make)
