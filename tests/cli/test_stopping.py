"""Ctrl-C and SIGTERM: one line, the exit code of shells, and a next run that says what it goes on from."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.heads import TEXT, student_with_tokenizer, teacher_with_other_head, trained_tokenizer

STOPPED = (
    "moe-svd-distill: stopped: finished parts are kept; training begins anew, as nothing of it had been saved yet; "
    "run the same command again"
)
SAVED = r"moe-svd-distill: stopped: finished parts are kept; training goes on from step ([\d,]+), saved \d+ s ago; .*"
SETTINGS = ("training.head=train", "training.epochs=1000", "training.learning_rate=0.01", "training.patience=1000")


# Whoever runs the tests in the background has Ctrl-C ignored, and processes inherit that.
NOT_IGNORED = (
    "import signal, sys\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from moe_svd_distill.cli import main\n"
    "main(sys.argv[1:])\n"
)


def stopped(words: list[str], number: signal.Signals, at: str) -> tuple[int, list[str]]:
    """Exit code and lines on standard error of a run that gets a signal once it has said something."""
    said: list[str] = []
    command = [sys.executable, "-c", NOT_IGNORED, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line.rstrip("\n"))
            if line.startswith(f"{at}, for "):
                process.send_signal(number)
                break
        said += process.stderr.read().splitlines()
    return process.returncode, said


@pytest.mark.slow
def test_a_stopped_run_says_so_and_the_next_one_goes_on(tmp_path: Path) -> None:
    student = student_with_tokenizer("llama", tmp_path / "s", trained_tokenizer(tmp_path / "tokenizer", 400))
    words = ["distill", "--teacher", str(teacher_with_other_head(student, tmp_path / "t")), "--student", str(student)]
    words += ["--output", str(tmp_path / "out"), "--calibration", str(TEXT), "--method", "refined", "--start", "zero"]
    words += ["--tokens", "1600", "--scale-search-tokens", "1100", "--device", "cpu", "--workers", "1"]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    code, said = stopped(words, signal.SIGINT, "training")
    assert (code, said[-1]) == (130, STOPPED), said
    code, again = stopped(words, signal.SIGTERM, "training")
    assert (code, again[-1]) == (143, STOPPED), again
    code, third = stopped([*words, "--set", "training.save_seconds=0.01"], signal.SIGINT, "training")
    assert code == 130
    saved = re.fullmatch(SAVED, third[-1])
    assert saved is not None, third
    code, fourth = stopped(words, signal.SIGINT, "training")
    assert any(line.startswith(f"training: resuming from step {saved[1]} of ") for line in fourth), fourth
    assert fourth[-1] == (
        f"moe-svd-distill: stopped: finished parts are kept; training goes on from step {saved[1]}, as this run did; "
        "run the same command again"
    )
    assert not any("Traceback" in line for line in said + again + third + fourth)
    assert not any("resuming" in line for line in said)
    assert any(line.startswith(f"resuming from {tmp_path / 'out'}: ") for line in again)


@pytest.mark.slow
def test_a_command_that_keeps_nothing_says_no_more(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from moe_svd_distill.cli import main\n"
        "from moe_svd_distill.cli.commands import recipe\n"
        "recipe.schema_command.callback = lambda: os.kill(os.getpid(), signal.SIGTERM) or sys.stdin.read()\n"
        "main(['schema'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (143, "moe-svd-distill: stopped\n")
