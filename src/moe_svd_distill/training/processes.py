"""The processes of a training run: this one, and one more for each further device."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from moe_svd_distill.execution.processes import live_with_parent, started
from moe_svd_distill.training.job import OnProgress, StudentInTraining, TrainingJob, TrainingReport, threads
from moe_svd_distill.training.process_group import Distributed, ProcessGroup

_GRACE_S = 5.0


@contextmanager
def run_training(job: TrainingJob, on_progress: OnProgress) -> Iterator[tuple[StudentInTraining, TrainingReport]]:
    """Train in as many processes as the job has devices; hands out the student as it came out, until this closes.

    Raises:
        IncompleteError: One of the processes is gone.
    """
    with threads(job.placement.threads), ExitStack() as stack:
        with _meeting(job) as group:
            student = StudentInTraining(job, group)
            stack.callback(student.close)
            report = student.train(on_progress)
        yield student, report


@contextmanager
def _meeting(job: TrainingJob) -> Iterator[ProcessGroup]:
    """All processes of a job, of which this one is the first; the others are gone when it closes."""
    devices, count = job.placement.devices, len(job.placement.devices)
    if count == 1:
        yield ProcessGroup()
        return
    address = f"tcp://127.0.0.1:{_free_port()}"
    others = [_start(job, number, address) for number in range(1, count)]
    try:
        group = Distributed(0, count, address, torch.device(devices[0]))
        try:
            yield group
        finally:
            group.close()
    finally:
        for other in others:
            other.join(_GRACE_S)
            other.kill()
            other.join()


def _start(job: TrainingJob, number: int, address: str) -> Any:
    with started(f"trainer {number}", _take_part, (job, number, address)) as process:
        return process


def _take_part(job: TrainingJob, number: int, address: str) -> None:  # pragma: no cover - runs in another process
    """The life of a further process."""
    live_with_parent()
    torch.set_num_threads(job.placement.threads)
    devices = job.placement.devices
    group = Distributed(number, len(devices), address, torch.device(devices[number]))
    StudentInTraining(job, group).train(lambda progress: None)
    group.close()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
