"""Terminals that lack letters, file names that are no text, and readers that go away."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from moe_svd_distill.cli.main import NOBODY_READS
from tests.support.heads import TEXT, student_with_tokenizer, teacher_with_other_head, trained_tokenizer
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


def _lines_on_a_terminal(columns: int, words: list[object]) -> list[str]:
    """What a command writes to a terminal of so many columns, without colours and movements."""
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover - another process
        os.environ.update(COLUMNS=str(columns), LINES="50", TERM="xterm-256color")
        os.execv(sys.executable, [*PROGRAM, *map(str, words)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    written = b""
    with suppress(OSError):  # its end, on Linux
        while piece := os.read(terminal, 65536):
            written += piece
    _, status = os.waitpid(pid, 0)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    assert os.waitstatus_to_exitcode(status) == 0, plain
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain)]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_is_wrapped_by_the_terminal_or_cut(columns: int, tmp_path: Path) -> None:
    student = student_with_tokenizer("llama", tmp_path / "s", trained_tokenizer(tmp_path / "tokenizer", 400))
    teacher, out = teacher_with_other_head(student, tmp_path / "t"), tmp_path / "out"
    pair: list[object] = ["--teacher", teacher, "--student", student, "--calibration", TEXT, "--device", "cpu"]
    pair += ["--method", "weights", "--workers", 1, "--tokens", 1024, "--scale-search-tokens", 1024, "--output", out]
    commands: list[list[object]] = [
        ["inspect", teacher, student],
        ["plan", *pair],
        ["distill", *pair],
        ["evaluate", out, "--text", TEXT, "--tokens", 1024],
        ["verify", out],
    ]
    for words in commands if columns == 80 else commands[1:4]:
        lines = _lines_on_a_terminal(columns, words)
        long = [line for line in lines if len(line) > columns and len(line.removesuffix(" \\").split()) > 1]
        assert long == [], words
        assert not [line for line in lines if "…" in line and " … " not in line], words
