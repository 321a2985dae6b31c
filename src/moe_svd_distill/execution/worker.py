"""The other side of the pipe: a process that computes one unit after another and writes their parts.

It imports nothing heavy itself. Threads are fixed before the work (and with it torch) is imported, because sums and
decompositions change bits with the number of threads. The process leaves within a second of its parent's death.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import DistillError
from moe_svd_distill.execution.memory import MemoryWatch, give_back
from moe_svd_distill.execution.spawning import leave_with_parent
from moe_svd_distill.files.writing import explain_writing

_PROGRESS_EVERY_S = 0.5
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Ready:
    """The work is loaded; units may come."""


@dataclass(frozen=True)
class Progress:
    """The unit goes on."""

    fraction: float


@dataclass(frozen=True)
class Done:
    """The part is on the disk."""

    seconds: float
    peak_bytes: int
    backoff: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    """This attempt failed in a way that another may not. The process ends: what it has loaded may be broken too."""

    reason: str
    detail: str
    peak_bytes: int


@dataclass(frozen=True)
class Hopeless:
    """Every attempt would fail like this one."""

    error: DistillError
    detail: str


@dataclass(frozen=True)
class NotStarted:
    """The work cannot be loaded."""

    reason: str
    detail: str


class _Reporter:
    """Tells the parent that the unit goes on, not more often than it wants to know."""

    def __init__(self) -> None:
        self._pipe: connection.Connection | None = None
        self._last = 0.0

    def attach(self, pipe: connection.Connection) -> None:
        self._pipe = pipe

    def report(self, fraction: float) -> None:
        now = time.monotonic()
        if self._pipe is not None and now - self._last >= _PROGRESS_EVERY_S:
            self._last = now
            self._pipe.send(Progress(fraction))


_reporter = _Reporter()


def report_progress(fraction: float) -> None:
    """To be called by work from time to time, on the thread that runs it: shows progress and proves that it is alive.

    Outside a worker process it does nothing.
    """
    _reporter.report(fraction)


def run_worker(
    pipe: connection.Connection, pickled_work: bytes, device: str, folder: Path, threads: int
) -> None:  # pragma: no cover - runs in another process
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    memory = MemoryWatch()
    threading.Thread(target=leave_with_parent, args=(memory.look,), daemon=True).start()
    try:
        try:
            work = _load(pickled_work, threads)
        except DistillError as error:
            pipe.send(Hopeless(_portable(error), traceback.format_exc()))
            return
        except Exception as error:
            pipe.send(NotStarted(_one_line(error), traceback.format_exc()))
            return
        _reporter.attach(pipe)
        pipe.send(Ready())
        while True:
            answer = _compute(work, pickle.loads(pipe.recv_bytes()), device, folder, memory)  # noqa: S301
            pipe.send(answer)
            if not isinstance(answer, Done):
                return
            give_back()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # dismissed
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # the parts are on the disk; taking torch down in good order would only take time


def _load(pickled_work: bytes, threads: int) -> Any:
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    return pickle.loads(pickled_work)  # noqa: S301 - bytes that the parent made


def _compute(work: Any, unit: Any, device: str, folder: Path, memory: MemoryWatch) -> Done | Failed | Hopeless:
    from moe_svd_distill.execution.backoff import compute
    from moe_svd_distill.execution.parts import write_part

    begun = time.monotonic()
    try:
        content, steps = compute(work, unit, device)
        write_part(folder, unit.key, content)
        return Done(time.monotonic() - begun, memory.look(), steps)
    except DistillError as error:
        return Hopeless(_portable(error), traceback.format_exc())
    except Exception as error:
        explained = explain_writing(error, folder)
        if explained is not None:
            return Hopeless(explained, traceback.format_exc())
        return Failed(_one_line(error), traceback.format_exc(), memory.look())


def _portable(error: DistillError) -> DistillError:
    """The same error, or its nearest relation that survives the trip to the parent."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    except Exception:
        copy = None
    return error if type(copy) is type(error) else DistillError(error.what, error.action)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
