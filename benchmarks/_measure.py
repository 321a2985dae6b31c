"""CPU time at one thread, and the words that say on which machine it was measured."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits


@dataclass(frozen=True)
class Timing:
    """Seconds of CPU time of the repetitions of one call."""

    median: float
    fastest: float
    repetitions: int


def one_thread() -> None:
    """Keep torch, BLAS and OpenMP to a single thread from here on."""
    torch.set_num_threads(1)
    threadpool_limits(1)


def cpu_time(call: Callable[[], Any], repetitions: int) -> Timing:
    """CPU time of ``call``, all threads of the process together."""
    seconds = []
    for _ in range(repetitions):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return Timing(statistics.median(seconds), min(seconds), repetitions)


def machine() -> dict[str, str]:
    """Processor, versions and date."""
    return {
        "cpu": _cpu_model(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "load": _load(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def print_machine() -> None:
    """One line that belongs above every table."""
    print(", ".join(f"{name}: {value}" for name, value in machine().items()))


def write_json(path: Path, rows: list[Any]) -> None:
    """The machine and the rows of the table (dataclasses)."""
    path.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.machine()


def _load() -> str:
    """Other work on the machine distorts even CPU time, through the caches."""
    try:
        import os

        return f"{os.getloadavg()[0]:.1f}"
    except OSError:
        return "unknown"
