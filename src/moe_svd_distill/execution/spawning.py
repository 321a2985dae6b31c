"""Starting processes of our own cleanly, and their leaving with their parent."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, parent_process, resource_tracker
from types import ModuleType

START_METHOD = "spawn"  # CUDA does not survive a fork, and neither do the threads of torch
_LOOK_EVERY_S = 0.2


def leave_with_parent(look: Callable[[], object]) -> None:
    """For a thread of its own: look around from time to time, and end the process when its parent is gone."""
    parent = parent_process()
    assert parent is not None
    while not connection.wait([parent.sentinel], timeout=_LOOK_EVERY_S):
        look()
    os._exit(1)


@contextmanager
def signals_held(start_method: str) -> Iterator[None]:
    """Hold back Ctrl-C while a process starts: it would hit the child before the child can ignore it."""
    if start_method == "spawn":
        resource_tracker.ensure_running()  # it would lift the mask if it were started within
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def bare_main(pickled_work: bytes) -> Iterator[None]:
    """Keep a spawned child from running the caller's main script again.

    It would cost all its imports in every worker, and a script without ``if __name__ == "__main__"`` would start
    itself over and over. Work that is defined in the main script still needs it.
    """
    main = sys.modules["__main__"]
    if b"__main__" not in pickled_work:
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
