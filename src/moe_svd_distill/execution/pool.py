"""The worker processes as the parent sees them: starting, hearing, and ending them.

Plain `Process` objects with a pipe each. The pools of the standard library lose every task, or hang, when one of their
processes is killed, and `torch.multiprocessing.spawn` ends all siblings.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import IncompleteError
from moe_svd_distill.execution.events import Event
from moe_svd_distill.execution.processes import started
from moe_svd_distill.execution.worker import run_worker

_GRACE_S = 2.0


@dataclass
class Worker:
    """One process, and what the parent knows of it.

    Args:
        slot: Its place among the workers; whoever replaces it gets the same place and device.
        device: Where it computes.
        process: The process.
        pipe: The parent's end of the pipe.
        ready: Whether it has loaded the work.
        unit: The unit it holds.
        last_heard: When it last gave a sign of life, on the monotonic clock.
    """

    slot: int
    device: str
    process: Any
    pipe: connection.Connection
    ready: bool = False
    unit: Any = None
    last_heard: float = field(default_factory=time.monotonic)

    @property
    def idle(self) -> bool:
        """Whether it waits for a unit."""
        return self.ready and self.unit is None

    def give(self, unit: Any, attempt: int) -> None:
        """Hand it a unit. If it has just died, nothing happens; its sentinel will tell."""
        self.unit = unit
        self.last_heard = time.monotonic()
        with suppress(OSError):
            self.pipe.send_bytes(pickle.dumps((unit, attempt)))

    def hear(self) -> Iterator[Event | Exception]:
        """What it has said and nobody has heard yet."""
        try:
            while self.pipe.poll():
                yield self.pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return

    def end(self) -> str:
        """End it at once, wait for it, and say how it ended."""
        self.process.kill()
        self.process.join()
        code: int = self.process.exitcode
        self.pipe.close()
        self.process.close()
        if code >= 0:
            return f"exit code {code}"
        if code == -signal.SIGKILL:
            return "killed by SIGKILL; the system does that when memory runs out"
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"


class WorkerPool:
    """All workers of a run."""

    def __init__(self, work: Any, folder: Path, devices: tuple[str, ...], threads: int) -> None:
        self._pickled_work = pickle.dumps(work)
        self._folder = folder
        self._devices = devices
        self._threads = threads
        self.workers: dict[int, Worker] = {}

    def hire(self, slot: int) -> None:
        """Start a process in this place.

        Raises:
            IncompleteError: The system gives no more processes or memory.
        """
        parent_end, worker_end = multiprocessing.Pipe()
        device = self._devices[slot % len(self._devices)]
        arguments = (worker_end, self._pickled_work, slot, device, self._folder, self._threads)
        try:
            with started(f"worker {slot}", run_worker, arguments, self._pickled_work) as process:
                self.workers[slot] = Worker(slot, device, process, parent_end)
        except OSError as error:
            parent_end.close()
            raise IncompleteError(
                f"Cannot start worker process {slot + 1}: {error.strerror}",
                "Use fewer workers and run the same command again; finished parts are kept",
            ) from error
        finally:
            worker_end.close()

    def drop(self, worker: Worker) -> str:
        """End a worker, alive or not, and say how its process ended."""
        del self.workers[worker.slot]
        return worker.end()

    def dismiss(self) -> None:
        """End all workers: those who wait leave by themselves, those who compute are stopped within their unit."""
        for worker in self.workers.values():
            if not worker.idle:
                worker.process.terminate()
            worker.pipe.close()
        deadline = time.monotonic() + _GRACE_S
        for worker in self.workers.values():
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.process.close()
        self.workers.clear()
