"""What is counted of a house."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCE = """
from dataclasses import dataclass
from typing import Any

@dataclass(frozen=True)
class One:
    def method(self, a, b, c, d, e, f) -> dict[str, Any]: ...

def long(a, b, c, d, /, e, *, f, g: dict[str, Any]): ...
"""


def test_lines_files_dataclasses_and_long_signatures_are_counted(tmp_path: Path) -> None:
    (tmp_path / "house" / "room").mkdir(parents=True)
    (tmp_path / "house" / "room" / "one.py").write_text(SOURCE)
    (tmp_path / "house" / "top.py").write_text("x = 1\n")
    command = [sys.executable, "-m", "benchmarks.count", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    words = [line.split() for line in done.stdout.splitlines()]
    assert [line[-1] for line in words[:5]] == ["10", "2", "1", "1", "2"]
    assert words[5] == ["7", "arguments:", "house/room/one.py:", "long"]
    assert [line[-1] for line in words[6:]] == ["house/room", "house"]
