"""Python in the manual runs: as a script in an empty folder, the way it is copied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import MANUAL, ROOT, named, runnable

CODE = [
    pytest.param(code, id=f"{named(page)}-{number}", marks=[pytest.mark.slow, pytest.mark.timeout(900)] if slow else [])
    for page in MANUAL
    for number, (code, slow) in enumerate(runnable(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("code", CODE)
def test_python_of_the_manual_runs(code: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
