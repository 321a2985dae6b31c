"""Progress where nobody sees a bar: a line when a stage begins, and one every half minute while it lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

EVERY_S = 30.0


@dataclass(frozen=True)
class _Stage:
    name: str
    begin: float
    first: float
    fraction: float | None

    def line(self, now: float) -> str:
        """The stage, its share done, and the time left as far as its own speed tells."""
        text = f"{self.name}, for {duration(now - self.begin)}"
        if self.fraction is None:
            return text
        text += f": {self.fraction:.0%}"
        done = self.fraction - self.first
        if done <= 0 or self.fraction >= 1:
            return text
        return f"{text}, about {duration((now - self.begin) * (1 - self.fraction) / done)} left"


class ProgressLines:
    """Says where a run stands, from a thread of its own."""

    def __init__(self, say: Callable[[str], None], every_s: float = EVERY_S) -> None:
        """Nothing is said before `start`.

        Args:
            say: Told each line.
            every_s: Seconds between two lines of one stage.
        """
        self._say, self._every_s = say, every_s
        self._stage: _Stage | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def reached(self, name: str, fraction: float | None) -> None:
        """A stage and how much of it is done; None where that cannot be known."""
        stage = self._stage
        if stage is None or stage.name != name:
            self._stage = _Stage(name, time.monotonic(), fraction or 0.0, fraction)
            self._say(name)
        else:
            self._stage = _Stage(name, stage.begin, stage.first, fraction)

    def stop(self) -> None:
        """Say no more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            stage = self._stage
            if stage is not None:
                self._say(stage.line(time.monotonic()))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
