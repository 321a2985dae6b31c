"""The other side of the pipe: a process that computes one unit after another and writes their parts.

It imports nothing heavy itself. Threads are fixed before the work (and with it torch) is imported, because sums and
decompositions change bits with the number of threads. The process leaves within a second of its parent's death.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from moe_svd_distill.errors import DistillError
from moe_svd_distill.execution.events import UnitFailed, UnitFinished, UnitProgress, WorkerStarted
from moe_svd_distill.execution.memory import MemoryWatch, give_back
from moe_svd_distill.execution.parts import PartContent, write_part
from moe_svd_distill.execution.processes import live_with_parent
from moe_svd_distill.files.writing import explain_writing

FREED_CACHE = "freed the device's cache and tried again"
USED_CPU = "computed on the CPU"

_PROGRESS_EVERY_S = 0.5
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class Unit(Protocol):
    """A piece of work that can be done anywhere; it must survive pickling."""

    @property
    def key(self) -> str:
        """The hash, in hex, of everything the result depends on."""

    @property
    def label(self) -> str:
        """What people call it, such as "layer 3"."""

    @property
    def cost(self) -> float:
        """What it costs, relative to the others; the heaviest go first."""


class Work(Protocol):
    """Computes a unit; it must survive pickling, and gives the same bytes wherever it runs."""

    def __call__(self, unit: Any, device: str) -> PartContent:
        """Compute ``unit`` on ``device``."""


class _Reporter:
    """Tells the parent that the unit goes on, not more often than it wants to know."""

    def __init__(self) -> None:
        self._send: Callable[[float], None] | None = None
        self._last = 0.0

    def attach(self, send: Callable[[float], None]) -> None:
        self._send = send

    def report(self, fraction: float) -> None:
        now = time.monotonic()
        if self._send is not None and now - self._last >= _PROGRESS_EVERY_S:
            self._last = now
            self._send(fraction)


_reporter = _Reporter()


def report_progress(fraction: float) -> None:
    """To be called by work from time to time, on the thread that runs it: shows progress and proves that it is alive.

    Outside a worker process it does nothing.
    """
    _reporter.report(fraction)


def run_worker(
    pipe: connection.Connection, pickled_work: bytes, number: int, device: str, folder: Path, threads: int
) -> None:  # pragma: no cover - runs in another process
    """The life of a worker process: it sends events, or the error that every attempt would end in."""
    memory = MemoryWatch()
    live_with_parent(memory.look)
    try:
        try:
            work = _load(pickled_work, threads)
        except DistillError as error:
            pipe.send(_portable(error, "its start"))
            return
        except Exception as error:
            pipe.send(RuntimeError(f"the workers cannot load the work: {_one_line(error)}\n{traceback.format_exc()}"))
            return
        pipe.send(WorkerStarted(number, device, os.getpid()))
        while True:
            unit, attempt = pickle.loads(pipe.recv_bytes())  # noqa: S301
            _reporter.attach(lambda fraction, label=unit.label: pipe.send(UnitProgress(number, label, fraction)))  # type: ignore[misc]
            begun = time.monotonic()
            try:
                steps = _complete(work, unit, device, folder)
            except Exception as error:
                explained = error if isinstance(error, DistillError) else explain_writing(error, folder)
                if explained is not None:
                    pipe.send(_portable(explained, unit.label))
                    return
                reason, detail = _one_line(error), traceback.format_exc()
                # What it has loaded may be broken too, so this process does not go on.
                pipe.send(UnitFailed(number, unit.label, attempt, reason, detail, memory.look()))
                return
            seconds = time.monotonic() - begun
            pipe.send(UnitFinished(number, unit.label, seconds, reused=False, backoff=steps, peak_bytes=memory.look()))
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


def _complete(work: Work, unit: Unit, device: str, folder: Path) -> tuple[str, ...]:
    """Have the part of a unit on the disk; returns the steps taken because memory ran out. No tensor outlives it."""
    (tensors, record), steps = compute(work, unit, device)
    write_part(folder, unit.key, tensors, record)
    return steps


def compute(work: Work, unit: Unit, device: str) -> tuple[PartContent, tuple[str, ...]]:
    """Compute a unit; when the device's memory runs out, free what is cached and try again, then use the CPU.

    The algorithm is never exchanged for another one, and nothing is retried in silence.

    Returns:
        The content, its record completed by the kind of device and the steps taken, and the steps.
    """
    steps: tuple[str, ...] = ()
    content = _attempt(work, unit, device)
    if content is None:
        _free(device)
        steps = (FREED_CACHE,)
        content = _attempt(work, unit, device)
    if content is None:
        _free(device)
        steps = (FREED_CACHE, USED_CPU)
        device = "cpu"
        content = work(unit, device)
    tensors, facts = content
    record = {**facts, "device": device.split(":")[0]}  # not which GPU: that depends on chance
    if steps:
        record["backoff"] = list(steps)
    return (tensors, record), steps


def _attempt(work: Work, unit: Unit, device: str) -> PartContent | None:
    """None when memory ran out. The exception dies here, and with it the frames that hold the tensors."""
    try:
        return work(unit, device)
    except RuntimeError as error:
        if device == "cpu" or not _is_out_of_memory(error):
            raise
        return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "out of memory" in text or "_alloc_failed" in text  # CUDA itself, and its libraries


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _portable(error: DistillError, where: str) -> DistillError:
    """The same error, or its nearest relation that survives the trip to the parent, with where it was raised."""
    note = f"In a worker process, at {where}:\n{traceback.format_exc()}"
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    except Exception:
        copy = None
    portable = error if type(copy) is type(error) else DistillError(error.what, error.action)
    portable.add_note(note)
    return portable


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
