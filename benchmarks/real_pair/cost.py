"""Run a command and keep what it took, processes that it starts included."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_LOOK_EVERY_S = 0.5


def run_measured(command: Sequence[str], log: Path) -> dict[str, Any]:
    """Run a command to its end.

    Args:
        command: Program and arguments.
        log: What it prints goes there.

    Returns:
        Seconds, CPU seconds of all processes, the highest sum of their memory (proportional set sizes, looked at twice
        a second), bytes handed to the file system for writing, and the machine's load at the end.

    Raises:
        SystemExit: It fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begin, peak, over = time.monotonic(), [0], threading.Event()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, over), daemon=True)
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    over.set()
    watcher.join()
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise SystemExit(f"exit code {process.returncode} of {' '.join(command)}: {''.join(last)} (see {log})")
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_bytes": max(peak[0], used.ru_maxrss * 1024),
        "written_bytes": used.ru_oublock * 512,
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
    }


def _watch(pid: int, peak: list[int], over: threading.Event) -> None:
    while not over.wait(_LOOK_EVERY_S):
        with suppress(psutil.Error):
            parent = psutil.Process(pid)
            peak[0] = max(peak[0], sum(map(_memory, [parent, *parent.children(recursive=True)])))


def _memory(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0
