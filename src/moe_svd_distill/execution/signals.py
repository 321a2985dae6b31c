"""Ctrl-C and SIGTERM as something to look at between two steps, instead of an exception in the middle of one."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


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
