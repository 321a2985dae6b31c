"""Problems in the format of HumanEval, and a model's folder to write with."""

from __future__ import annotations

import json
from pathlib import Path

GREEN = {
    "task_id": "own/0",
    "prompt": "def color():\n    return 'green'\n\n",
    "entry_point": "color",
    "test": "def check(candidate):\n    assert candidate() == 'green'\n",
    "canonical_solution": "",
}
"""Solved whatever follows, as long as that is Python, such as nothing; a random model writes no Python."""

WRONG = {
    **GREEN,
    "task_id": "own/1",
    "prompt": "\n" + GREEN["prompt"],
    "test": "def check(candidate):\n    assert candidate() == 'red'\n",
}


def write_problems(path: Path, *problems: dict[str, str]) -> Path:
    """A file of problems."""
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path
