"""Programs under limits: what passes, what does not, and what is left of the machine."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.code.sandbox import Guards, Limits, guards, run_program

LIMITS = Limits(cpu_seconds=1, wall_seconds=5.0, memory_bytes=512 << 20, file_bytes=1 << 20)


@pytest.fixture(scope="module", params=["all there is", "limits alone"])
def allowed(request: pytest.FixtureRequest) -> Guards:
    found = guards()
    return found if request.param == "all there is" else Guards(network=False, files=found.files)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(x):\n    return x + 1\nassert f(1) == 2", ""),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "exit code 0"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('large', 'wb').write(bytes(2 << 20))", "OSError"),
        ("import sys\nsys.stderr.write('x' * 1000)\nprint('y' * 1000)\nraise ValueError", "ValueError"),
        ("raise KeyError('\\n' * 1000)", "KeyError"),
        ("input()", "EOFError"),
    ],
)
def test_a_program_passes_if_it_comes_to_its_end(program: str, reason: str, allowed: Guards) -> None:
    outcome = run_program(program, LIMITS, allowed)
    assert outcome == (reason or None)


@pytest.mark.parametrize("program", ["while True:\n    pass", "import time\ntime.sleep(60)"])
def test_an_endless_program_is_stopped(program: str, allowed: Guards) -> None:
    begin = time.monotonic()
    outcome = run_program(program, Limits(cpu_seconds=1, wall_seconds=2.0), allowed)
    assert outcome == "timed out"
    assert time.monotonic() - begin < 20


def test_a_program_has_an_empty_folder_and_environment_of_its_own(
    allowed: Guards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_USER", "x")
    program = (
        "import os, tempfile\n"
        "assert 'SECRET_OF_THE_USER' not in os.environ and 'HOME' not in os.environ\n"
        "assert os.listdir() == []\n"
        "open('mine', 'w').write('x')\n"
        "tempfile.NamedTemporaryFile().close()\n"
        "assert os.listdir() == ['mine']\n"
    )
    for _ in range(2):
        assert run_program(program, LIMITS, allowed) is None


@pytest.mark.parametrize(
    "change", ["os.remove({0!r})", "open({0!r}, 'w')", "os.truncate({0!r}, 0)", "os.rename({0!r}, 'mine')"]
)
def test_a_program_changes_no_file_outside_its_folder(change: str, allowed: Guards, tmp_path: Path) -> None:
    if not allowed.files:
        pytest.skip("the kernel has no Landlock")
    precious = tmp_path / "precious"
    precious.write_text("kept")
    assert run_program(f"import os\n{change.format(str(precious))}", LIMITS, allowed) == "PermissionError"
    assert precious.read_text() == "kept"


def test_nothing_that_a_program_starts_outlives_it(tmp_path: Path) -> None:
    found = guards()
    if not found.network:
        pytest.skip("no namespaces here")
    program = "import subprocess\nsubprocess.Popen(['sleep', '977'], start_new_session=True)"
    run_program(program, LIMITS, found)
    commands = [file.read_bytes() for file in _command_lines()]
    assert b"sleep\x00977\x00" not in commands


def test_the_network_is_out_of_reach() -> None:
    import socket

    found = guards()
    if not found.network:
        pytest.skip("no namespaces here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert run_program(program, LIMITS, Guards(network=False, files=found.files)) is None
        assert run_program(program, LIMITS, found)


def test_without_limits_nothing_is_run() -> None:
    with pytest.raises(BadDataError, match="generated code cannot be limited here"):
        run_program("x = 1", replace(LIMITS, file_bytes=1 << 80), guards())


def _command_lines() -> list[Path]:
    return [file for file in Path("/proc").glob("[0-9]*/cmdline") if file.is_file()]
