"""Terminals that lack letters, file names that are no text, and readers that go away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_svd_distill.cli.main import NOBODY_READS
from tests.support.models import saved

PROGRAM = [sys.executable, "-m", "moe_svd_distill"]
TERMINALS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin": {"PYTHONIOENCODING": "latin-1"},
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder whose name no encoding but UTF-8 has."""
    return saved("llama", tmp_path_factory.mktemp("models") / "modèle-模型", seed=1)


def _run(words: list[object], terminal: str) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONIOENCODING", "LC_ALL")}
    return subprocess.run(
        [*PROGRAM, *map(str, words)], capture_output=True, env=environment | TERMINALS[terminal], check=False
    )


@pytest.mark.parametrize("terminal", TERMINALS)
def test_output_never_fails_for_its_letters(model: Path, terminal: str) -> None:
    done = _run(["inspect", model], terminal)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("terminal", TERMINALS)
def test_refusals_keep_their_code(tmp_path: Path, terminal: str) -> None:
    done = _run(["inspect", tmp_path / "nichts-da-模"], terminal)
    assert done.returncode in (66, 69), done.stderr
    assert b"Internal" not in done.stderr


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_file_name_that_is_no_text_is_printed_somehow(tmp_path: Path, terminal: str) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    Path(folder).mkdir()
    done = subprocess.run(
        [*PROGRAM, "clean", folder], capture_output=True, env=os.environ | TERMINALS[terminal], check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words", [["--help"], ["inspect", "MODEL"], ["inspect", "MODEL", "--json"], ["init", "a", "b"]]
)
def test_a_closed_pipe_ends_quietly(model: Path, words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    given = [str(model) if word == "MODEL" else word for word in words]
    try:
        done = subprocess.run([*PROGRAM, *given], stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert done.stderr == b""
    assert done.returncode == NOBODY_READS


def test_a_closed_pipe_for_what_people_read_ends_quietly_too(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*PROGRAM, "inspect", str(tmp_path / "none")], stdout=subprocess.PIPE, stderr=writing, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stdout) == (NOBODY_READS, b"")
