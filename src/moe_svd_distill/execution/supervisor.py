"""Units of work handed to worker processes one at a time, and carried on whatever happens to a process.

The heaviest units go first, each worker gets the next one when it has finished the last, and a unit is done when its
part is on the disk. So nothing depends on the number of workers but time. A unit whose process dies, hangs or fails is
tried again in a fresh process; after the last attempt it is set aside and the others go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import IncompleteError
from moe_svd_distill.execution import events
from moe_svd_distill.execution.events import Event
from moe_svd_distill.execution.parts import find_fault, part_path, reject_part
from moe_svd_distill.execution.pool import Worker, WorkerPool
from moe_svd_distill.execution.processes import StopSignals
from moe_svd_distill.execution.worker import Unit, Work
from moe_svd_distill.files.writing import make_folder, remove_stale_temporaries

__all__ = ["ExecutionSettings", "ExecutionSummary", "Unit", "UnitsSetAsideError", "Work", "execute"]

_STARTING_LIMIT_S = 300.0  # importing torch from a cold network disk
_LONGEST_WAIT_S = 60.0
_OVERSLEPT_S = 5.0


@dataclass(frozen=True)
class ExecutionSettings:
    """How a run is carried out.

    Args:
        workers: The most processes at a time.
        devices: Given to the workers in turn.
        threads_per_worker: Changes the bits of the results, so it belongs in the key of every unit.
        heartbeat_limit_s: A unit without progress for this long is taken to hang. Work that takes longer has to call
            `worker.report_progress`.
        attempts: How often a unit is tried.
    """

    workers: int
    devices: tuple[str, ...] = ("cpu",)
    threads_per_worker: int = 1
    heartbeat_limit_s: float = 1800.0
    attempts: int = 3

    def __post_init__(self) -> None:
        if self.workers < 1 or self.threads_per_worker < 1 or self.attempts < 1 or not self.devices:
            raise ValueError(f"workers, threads, attempts and devices must be at least one: {self}")


@dataclass(frozen=True)
class ExecutionSummary:
    """What a run did.

    Args:
        parts: Key to part, in the order of the units.
        computed: How many units this run computed.
        reused: How many it found done.
        failed: Label to reason, of the units set aside.
        seconds: How long it took.
        peak_memory: Worker to the most anonymous memory it used, in bytes.
    """

    parts: Mapping[str, Path]
    computed: int
    reused: int
    failed: Mapping[str, str]
    seconds: float
    peak_memory: Mapping[int, int]


class UnitsSetAsideError(IncompleteError):
    """Some units failed on every attempt; all others are done. `summary` tells which."""

    summary: ExecutionSummary | None = None


def execute(
    units: Sequence[Unit], work: Work, folder: Path, settings: ExecutionSettings, on_event: Callable[[Event], None]
) -> ExecutionSummary:
    """Compute every unit whose part is not yet in ``folder``.

    Args:
        units: What is to be done; their keys differ.
        work: Computes one unit; must be importable by a fresh process.
        folder: Where parts lie and are written to. Only one run at a time may use it (see `publish.OutputFolder`).
        settings: How many processes, where, and how patient.
        on_event: Told what happens, on the calling thread.

    Raises:
        UnitsSetAsideError: Some units failed on every attempt.
        DistillError: Work raised it, or a part cannot be written; the run stops at once.
        KeyboardInterrupt: SIGINT or SIGTERM (`processes.Terminated`); the parts that were finished stay.
    """
    begun = time.monotonic()
    if len({unit.key for unit in units}) != len(units):
        raise ValueError("two units of work have the same key")
    make_folder(folder)
    remove_stale_temporaries(folder)
    run = _Execution(work, folder, settings, on_event)
    with StopSignals() as stop:
        reused = {unit.key for unit in units if run.reuse(unit, stop)}
        run.complete([unit for unit in units if unit.key not in reused], stop)
    done = {unit.key: part_path(folder, unit.key) for unit in units if unit.key not in run.failed}
    failed = {unit.label: run.failed[unit.key] for unit in units if unit.key in run.failed}
    summary = ExecutionSummary(
        done, len(done) - len(reused), len(reused), failed, time.monotonic() - begun, run.peak_memory
    )
    if failed:
        label, reason = next(iter(failed.items()))
        error = UnitsSetAsideError(
            f"{len(run.failed)} of {len(units)} units failed {settings.attempts} times, {label} with: {reason}",
            "Run the same command again; it goes on with what is missing",
        )
        error.summary = summary
        raise error
    return summary


@dataclass
class _Execution:
    work: Work
    folder: Path
    settings: ExecutionSettings
    on_event: Callable[[Event], None]
    failed: dict[str, str] = field(default_factory=dict)
    peak_memory: dict[int, int] = field(default_factory=dict)
    _queue: deque[Unit] = field(default_factory=deque)
    _failures: dict[str, int] = field(default_factory=dict)
    _bad_starts: int = 0

    def reuse(self, unit: Unit, stop: StopSignals) -> bool:
        """Whether an earlier run has left a whole part of this unit."""
        stop.raise_if_received()
        path = part_path(self.folder, unit.key)
        if not path.exists():
            return False
        fault = find_fault(path, unit.key)
        if fault is None:
            self.on_event(events.UnitFinished(None, unit.label, 0.0, reused=True))
            return True
        self.on_event(events.PartRejected(unit.label, fault, reject_part(path)))
        return False

    def complete(self, units: Sequence[Unit], stop: StopSignals) -> None:
        """Have every unit computed, or set aside."""
        if not units:
            return
        self._queue = deque(sorted(units, key=lambda unit: -unit.cost))
        pool = WorkerPool(self.work, self.folder, self.settings.devices, self.settings.threads_per_worker)
        try:
            while self._staff(pool):
                self._hand_out(pool)
                woken = self._listen(pool, stop)
                self._end_the_hung(pool, woken)
        finally:
            pool.dismiss()
            remove_stale_temporaries(self.folder)

    def _staff(self, pool: WorkerPool) -> bool:
        """Start workers as long as there are units for them; False when there is nothing left to do."""
        held = sum(worker.unit is not None for worker in pool.workers.values())
        wanted = min(self.settings.workers, len(self._queue) + held)
        for slot in range(self.settings.workers):
            if slot not in pool.workers and len(pool.workers) < wanted:
                pool.hire(slot)
        return wanted > 0

    def _hand_out(self, pool: WorkerPool) -> None:
        """Give units to those who wait. A last attempt has the machine to itself, in case memory was what it lacked."""
        for worker in pool.workers.values():
            if not worker.idle or not self._queue:
                continue
            held = [other.unit for other in pool.workers.values() if other.unit is not None]
            if held and any(self._is_last_attempt(unit) for unit in (*held, self._queue[0])):
                return
            unit = self._queue.popleft()
            worker.give(unit, self._attempt(unit))
            self.on_event(events.UnitStarted(worker.slot, unit.label, self._attempt(unit)))

    def _is_last_attempt(self, unit: Unit) -> bool:
        return 1 < self.settings.attempts == self._attempt(unit)

    def _listen(self, pool: WorkerPool, stop: StopSignals) -> float:
        """Wait for news and take it in; returns when the news was collected."""
        workers = list(pool.workers.values())
        waited_since = time.monotonic()
        timeout = max(0.0, min([self._limit(worker) + worker.last_heard for worker in workers]) - waited_since)
        timeout = min(timeout, _LONGEST_WAIT_S)
        watched: list[Any] = [stop.fileno()]
        for worker in workers:
            watched += [worker.pipe, worker.process.sentinel]
        heard = set(connection.wait(watched, timeout))
        stop.raise_if_received()
        woken = time.monotonic()
        overslept = woken - waited_since - timeout
        for worker in workers:
            if overslept > _OVERSLEPT_S:  # this process was stopped, and so may the workers have been
                worker.last_heard += overslept
            dead = worker.process.sentinel in heard
            if dead or worker.pipe in heard:
                for message in worker.hear():
                    self._take(pool, worker, message)
            if dead and worker.slot in pool.workers:
                self._lose(pool, worker, None)
        return woken

    def _take(self, pool: WorkerPool, worker: Worker, message: Event | Exception) -> None:
        worker.last_heard = time.monotonic()
        match message:
            case Exception():
                raise message
            case events.WorkerStarted():
                worker.ready = True
                self._bad_starts = 0
            case events.UnitFinished():
                worker.unit = None
                self._note_memory(worker, message.peak_bytes)
            case events.UnitFailed():
                self._note_memory(worker, message.peak_bytes)
                pool.drop(worker)
                self._fail(worker.unit, message)
                return
        self.on_event(message)

    def _end_the_hung(self, pool: WorkerPool, woken: float) -> None:
        """End workers that were silent until ``woken``. What they said since, while a listener was busy, comes next."""
        for worker in list(pool.workers.values()):
            if woken - worker.last_heard >= self._limit(worker):
                self._lose(pool, worker, f"no sign of life for {self._limit(worker):g} s")

    def _limit(self, worker: Worker) -> float:
        if not worker.ready:
            return max(_STARTING_LIMIT_S, self.settings.heartbeat_limit_s)
        return self.settings.heartbeat_limit_s if worker.unit is not None else float("inf")

    def _lose(self, pool: WorkerPool, worker: Worker, reason: str | None) -> None:
        ended = pool.drop(worker)
        remove_stale_temporaries(self.folder)
        reason = reason or f"its process ended ({ended})"
        unit = worker.unit
        self.on_event(events.WorkerLost(worker.slot, reason, unit.label if unit else None))
        if not worker.ready:
            self._bad_starts += 1
            if self._bad_starts >= self.settings.attempts:
                raise IncompleteError(f"No worker process can start: {reason}", "Run the same command again")
        if unit is not None:
            path = part_path(self.folder, unit.key)
            if path.exists() and find_fault(path, unit.key) is None:  # it died after its work was done
                self.on_event(events.UnitFinished(worker.slot, unit.label, 0.0, reused=False))
            else:
                self._fail(unit, events.UnitFailed(worker.slot, unit.label, self._attempt(unit), reason))

    def _attempt(self, unit: Unit) -> int:
        """Which attempt at a unit is the current or the next one, from 1."""
        return self._failures.get(unit.key, 0) + 1

    def _fail(self, unit: Unit, failed: events.UnitFailed) -> None:
        self._failures[unit.key] = failed.attempt
        self.on_event(failed)
        if failed.attempt < self.settings.attempts:
            self._queue.append(unit)
            return
        self.failed[unit.key] = failed.reason
        self.on_event(events.UnitSetAside(unit.label, failed.reason))

    def _note_memory(self, worker: Worker, peak: int) -> None:
        self.peak_memory[worker.slot] = max(peak, self.peak_memory.get(worker.slot, 0))
