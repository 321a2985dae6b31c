"""Processes of our own: Ctrl-C and SIGTERM looked at between two steps, starting cleanly, leaving with the parent."""

from __future__ import annotations

import multiprocessing
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


def live_with_parent(look: Callable[[], object] = lambda: None) -> None:
    """What a process of ours does first: Ctrl-C is left to its parent, and it leaves within a second of its death.

    Args:
        look: Called again and again meanwhile, on a thread of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    threading.Thread(target=_leave_with_parent, args=(look,), daemon=True).start()


def _leave_with_parent(look: Callable[[], object]) -> None:
    parent = parent_process()
    assert parent is not None
    while not connection.wait([parent.sentinel], timeout=_LOOK_EVERY_S):
        look()
    os._exit(1)


@contextmanager
def started(name: str, target: Callable[..., None], arguments: tuple[Any, ...], pickled: bytes = b"") -> Iterator[Any]:
    """A process of ours, for which Ctrl-C is held back until this closes.

    It would hit the process before that can ignore it, or this one before anybody knows of the process.

    Args:
        name: For people.
        target: What it does, which begins with `live_with_parent`.
        arguments: Of that.
        pickled: What else it will be sent.
    """
    context: Any = multiprocessing.get_context(START_METHOD)
    process = context.Process(target=target, args=arguments, name=f"moe-svd-distill {name}", daemon=True)
    if START_METHOD == "spawn":
        resource_tracker.ensure_running()  # it would lift the mask if it were started within
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        with _bare_main(pickled):
            process.start()
        yield process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def _bare_main(pickled_work: bytes) -> Iterator[None]:
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
