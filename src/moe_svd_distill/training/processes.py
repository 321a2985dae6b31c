"""The processes of a training run: this one, and one more for each further device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moe_svd_distill.execution.processes import START_METHOD, bare_main, leave_with_parent, signals_held
from moe_svd_distill.training.job import Listener, StudentInTraining, TrainingJob, TrainingReport, threads
from moe_svd_distill.training.process_group import Distributed, SingleProcess

_GRACE_S = 5.0


@contextmanager
def run_training(job: TrainingJob, on_progress: Listener) -> Iterator[tuple[StudentInTraining, TrainingReport]]:
    """Train in as many processes as the job has devices; hands out the student as it came out, until this closes.

    Raises:
        IncompleteError: One of the processes is gone.
    """
    with threads(job.threads):
        if len(job.devices) == 1:
            student = StudentInTraining(job, SingleProcess())
            try:
                yield student, student.train(on_progress)
            finally:
                student.close()
            return
        address = f"tcp://127.0.0.1:{_free_port()}"
        others = [_start(job, number, address) for number in range(1, len(job.devices))]
        try:
            group = Distributed(0, len(job.devices), address, torch.device(job.devices[0]))
            try:
                student = StudentInTraining(job, group)
                outcome = student.train(on_progress)
            finally:
                group.close()
        finally:
            for other in others:
                other.join(_GRACE_S)
                other.kill()
                other.join()
        try:
            yield student, outcome
        finally:
            student.close()


def _start(job: TrainingJob, number: int, address: str) -> Any:
    context: Any = multiprocessing.get_context(START_METHOD)
    process = context.Process(
        target=_take_part, args=(job, number, address), name=f"moe-svd-distill trainer {number}", daemon=True
    )
    with signals_held(START_METHOD), bare_main(b""):
        process.start()
    return process


def _take_part(job: TrainingJob, number: int, address: str) -> None:  # pragma: no cover - runs in another process
    """The life of a further process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    threading.Thread(target=leave_with_parent, args=(lambda: None,), daemon=True).start()
    torch.set_num_threads(job.threads)
    group = Distributed(number, len(job.devices), address, torch.device(job.devices[number]))
    StudentInTraining(job, group).train(lambda progress: None)
    group.close()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
