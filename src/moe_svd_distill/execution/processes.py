"""Processes of our own: Ctrl-C and SIGTERM looked at between two steps, starting cleanly, leaving with the parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, parent_process, resource_tracker
from types import FrameType, ModuleType, TracebackType
from typing import Any

START_METHOD = "spawn"  # CUDA does not survive a fork, and neither do the threads of torch
_LOOK_EVERY_S = 0.2


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. The command line leaves with `exit_code`."""

    exit_code = 128 + signal.SIGTERM


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is noted and wakes `connection.wait`; the second one interrupts.

    Signals that were ignored before stay ignored. Outside the main thread nothing is changed, since Python delivers
    signals to that thread only.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._reading, self._writing = -1, -1

    def __enter__(self) -> StopSignals:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._reading)
        os.close(self._writing)
        if kind is None:
            self.raise_if_received()

    def fileno(self) -> int:
        """Readable once a signal has arrived."""
        return self._reading

    def raise_if_received(self) -> None:
        """Raise what a signal that has arrived asks for.

        Raises:
            KeyboardInterrupt: SIGINT arrived; `Terminated`, a kind of it, if SIGTERM did.
        """
        if self._received == signal.SIGTERM:
            raise Terminated
        if self._received is not None:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        second = self._received is not None
        self._received = number
        os.write(self._writing, b"!")
        if second:
            self.raise_if_received()


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
