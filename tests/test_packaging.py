"""The wheel alone, as it is installed: the program, the lab and nothing of the house around it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what installing the wheel puts there."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    building = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(building, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(installed: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=installed, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_demo_finds_its_models_and_text(installed: Path) -> None:
    code = "from moe_svd_distill.pipeline.lab import lab_pair as p; print(*vars(p('independent')).values(), sep='\\n')"
    paths = [Path(line) for line in python(installed, "-c", code).splitlines()[1:5]]
    assert all(path.exists() and path.is_relative_to(installed) for path in paths), paths


def test_the_program_runs(installed: Path) -> None:
    assert python(installed, "-m", "moe_svd_distill", "--version").startswith("moe-svd-distill")
    entry = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "moe-svd-distill = moe_svd_distill.cli:main" in entry.read_text()


def test_templates_and_types_are_in_it_and_tests_are_not(installed: Path) -> None:
    source = ROOT / "src" / "moe_svd_distill"
    wanted = {
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    package = installed / "moe_svd_distill"
    found = {path.relative_to(package) for path in package.rglob("*") if path.is_file() and "_lab" not in path.parts}
    assert found - {path for path in found if "__pycache__" in path.parts} == wanted
    assert sorted(path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")) == [
        "moe_svd_distill"
    ]
