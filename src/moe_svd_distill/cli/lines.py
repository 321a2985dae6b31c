"""What people read of a run where nobody sees a bar, and in log files: messages, and where it stands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moe_svd_distill.cli.screen import duration, roughly
from moe_svd_distill.execution import events

SOON_S = 3.0
"""A stage that takes less has no line."""
EVERY_S = 30.0
LATEST_S = 38.0
"""After so long there is a line even where only short stages follow one another."""
LOOK_S = 1.0


def messages(event: events.Event) -> Iterator[str]:
    """What of an event people should read, whatever else they see."""
    match event:
        case events.Noted(text):
            yield text
        case events.UnitFinished(_, label, _, _, backoff):
            yield from (f"{label}: {step}" for step in backoff)
        case events.UnitFailed(_, label, attempt, reason, _):
            yield f"{label}: attempt {attempt} failed: {reason}"
        case events.UnitSetAside(label, reason):
            yield f"{label}: set aside: {reason}"
        case events.WorkerLost(worker, reason, label):
            yield f"worker {worker} lost{f' with {label}' if label else ''}: {reason}"
        case events.PartRejected(label, reason, moved_to):
            yield f"{label}: the part on disk is damaged ({reason}); moved to {moved_to.name}, computing it again"


def details(event: events.Event) -> Iterator[str]:
    """What of an event people read who want to see everything."""
    match event:
        case events.WorkerStarted(worker, device, pid):
            yield f"worker {worker} on {device}, process {pid}"
        case events.UnitFinished(_, label, seconds, reused, _):
            yield f"{label}: {'found on the disk' if reused else duration(seconds)}"


@dataclass(frozen=True)
class _Stage:
    """A stage since `begin`, when `first` of it was done already."""

    name: str
    begin: float
    first: float
    fraction: float | None
    amount: str = ""

    def line(self, now: float) -> str:
        """The stage, its share done, and the time left as far as its own speed tells."""
        lasted = now - self.begin
        text = f"{self.name}, for {duration(lasted)}" if lasted >= SOON_S else self.name
        if self.fraction is None:
            return text
        text += f": {self.fraction:.0%}{f' ({self.amount})' if self.amount else ''}"
        done = self.fraction - self.first
        if done <= 0 or self.fraction >= 1 or lasted < SOON_S:
            return text
        return f"{text}, about {roughly(lasted * (1 - self.fraction) / done)} left"


class Lines:
    """Where nobody sees a bar: a line when a stage has lasted a while, and one every half minute from then on.

    Between `start` and `stop` a thread of its own looks once a second; `look` is what it does.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._stage: _Stage | None = None
        self._told, self._told_at = "", clock()
        self._units = _Units()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self, event: events.Event) -> None:
        if isinstance(event, events.StageReached):
            self._reached(event)
        elif self._units.take(event):
            reused = isinstance(event, events.UnitFinished) and event.reused
            self._reached(events.StageReached(events.WEIGHTS_STAGE, self._units.fraction), anew=reused)
        for line in messages(event):
            self._say(line)

    def _reached(self, reached: events.StageReached, anew: bool = False) -> None:
        """A stage that falls back, or is found partly done, is timed from there."""
        stage, now, fraction = self._stage, self._clock(), reached.fraction
        if stage is None or stage.name != reached.name or anew or (fraction or 0.0) < (stage.fraction or 0.0):
            self._stage = _Stage(reached.name, now, fraction or 0.0, fraction, reached.amount)
        else:
            self._stage = _Stage(stage.name, stage.begin, stage.first, fraction, reached.amount)

    def look(self) -> None:
        """Say where the run stands, if it is time for that."""
        stage, now = self._stage, self._clock()
        if stage is None:
            return
        lasts, silent = now - stage.begin >= SOON_S, now - self._told_at
        if (lasts and (stage.name != self._told or silent >= EVERY_S)) or silent >= LATEST_S:
            self._told, self._told_at = stage.name, now
            self._say(stage.line(now))

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look()


class _Units:
    """How much of the weights stage is done, by the costs of its units."""

    def __init__(self) -> None:
        self._costs: dict[str, int] = {}
        self._done: dict[str, float] = {}

    def take(self, event: events.Event) -> bool:
        """Whether the event says anything of that."""
        match event:
            case events.UnitsPlanned(units):
                self._costs, self._done = dict(units), {}
            case events.UnitStarted(_, label):
                self._done[label] = 0.0
            case events.UnitProgress(_, label, fraction):
                self._done[label] = fraction
            case events.UnitFinished(_, label):
                self._done[label] = 1.0
            case _:
                return False
        return True

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        done = sum(self._costs.get(label, 0) * fraction for label, fraction in self._done.items())
        return done / max(1, sum(self._costs.values()))
