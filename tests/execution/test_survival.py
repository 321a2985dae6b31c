"""Whole runs, killed from outside: nothing finished is lost, nobody is left behind, and the bytes are the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.storm import is_whole


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    """The driver as a process group of its own."""
    command = [sys.executable, "-m", "tests.support.driver", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def lines_until(driver: subprocess.Popen[str], word: str, count: int) -> list[str]:
    """What follows ``word`` in the driver's lines, once that has happened ``count`` times."""
    found: list[str] = []
    assert driver.stdout is not None
    for line in driver.stdout:
        kind, rest = line.rstrip().split(" ", 1)
        if kind == word:
            found.append(rest)
            if len(found) == count:
                return found
    raise AssertionError(f"the driver ended: {driver.communicate()}")


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("storm")
    command = [sys.executable, "-m", "tests.support.storm", str(folder), "5", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_spawned_run_killed_five_times(tmp_path: Path, storm: Any) -> None:
    """The whole group dies at random moments, some of them before any unit is begun."""
    chance = random.Random(3)
    out = tmp_path / "out"
    for _ in range(5):
        driver = start(out, "--seconds", "0.4")
        if chance.random() < 0.8:
            lines_until(driver, "unit", 1)
            time.sleep(chance.uniform(0.0, 0.6))
        else:
            time.sleep(chance.uniform(0.1, 1.0))
        os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()
    driver = start(out, "--seconds", "0.1")
    report, errors = driver.communicate()
    assert driver.returncode == 0, errors
    assert is_whole(out / "run.json", out / "adapter_model.safetensors")
    assert report.splitlines()[-1] == f"sha256 {storm['kills'][0]['digest']}"
    begun = (tmp_path / "out.journal").read_text().splitlines()
    assert 6 <= len(begun) <= 6 + 5 * 2  # each kill costs each of two workers no more than the unit it held
    assert not [path for path in out.rglob("*") if ".tmp~" in path.name or "rejected" in path.name]


def test_workers_leave_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    driver = start(tmp_path / "out", "--seconds", "60")
    workers = [int(pid) for pid in lines_until(driver, "worker", 2)]
    assert not any(map(is_gone, workers))
    driver.kill()
    deadline = time.monotonic() + 1.0
    while not all(map(is_gone, workers)):
        assert time.monotonic() < deadline, "a worker outlived its parent by a second"
        time.sleep(0.02)
    driver.communicate()


@pytest.mark.parametrize(("number", "code", "whole_group"), [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False)])
def test_signals_stop_a_run_at_once(tmp_path: Path, number: int, code: int, whole_group: bool) -> None:
    """Ctrl-C reaches the workers as well, and they leave it to the parent."""
    driver = start(tmp_path / "out", "--seconds", "60", "--workers", "1")
    workers = [int(pid) for pid in lines_until(driver, "worker", 1)]
    begun = time.monotonic()
    (os.killpg if whole_group else os.kill)(driver.pid, number)
    _, errors = driver.communicate(timeout=20)
    assert driver.returncode == code
    assert time.monotonic() - begun < 3
    assert errors == ""
    assert all(map(is_gone, workers))


def test_ctrl_c_while_workers_start(tmp_path: Path) -> None:
    driver = start(tmp_path / "out", "--seconds", "60")
    children: list[psutil.Process] = []
    while len(children) < 2:
        children = psutil.Process(driver.pid).children()
        time.sleep(0.005)
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=20)
    assert (driver.returncode, errors) == (130, "")


def test_forked_runs_killed_at_random(storm: Any) -> None:
    trials = storm["kills"]
    assert sum(trial["kills"] for trial in trials) >= 5
    assert len({trial["digest"] for trial in trials}) == 1
    for trial in trials:
        assert trial["begun"] <= 6 + trial["kills"] * trial["workers"], trial
        assert trial["leftovers"] == []


@pytest.mark.parametrize("over", ["fresh", "over old"])
@pytest.mark.parametrize(("how", "codes"), [("die", {9}), ("fail", {73})])
def test_a_crash_at_every_operation_on_files(storm: Any, over: str, how: str, codes: set[int]) -> None:
    """After a crash the folder holds no torn adapter, and the same command completes it."""
    *crashes, last = storm["crashes"][f"{how} {over}"]
    assert last["code"] == 0
    assert len(crashes) > 10
    assert {crash["code"] for crash in crashes} == codes
    assert Counter((crash["torn"], crash["again"], crash["whole"], crash["left"]) for crash in crashes) == {
        (False, 0, True, 0): len(crashes)
    }
    if how == "fail":
        assert all(crash["temporaries"] == 0 for crash in crashes)


def test_a_worker_starts_with_few_imports() -> None:
    """What the parent and the bootstrap of a worker import: no torch, and nothing that is not of this room."""
    heavy = ("torch", "numpy", "transformers", "safetensors", "pydantic", "scipy", "rich", "click")
    code = f"import sys, moe_svd_distill.execution.supervisor; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """A user's script that calls the library at its top level must not start itself again in every worker."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path.cwd())!r})\n"
        "print('once')\n"
        "from tests.support.driver import run\n"
        f"print(len(run(Path({str(tmp_path / 'out')!r}), 2, 2, 0.0)))\n"
    )
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "once"
    assert done.stdout.count("once") == 1
    assert done.stdout.splitlines()[-1] == "64"
