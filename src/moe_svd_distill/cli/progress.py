"""What people see while a command runs: bars on a terminal, lines elsewhere, and the same lines in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, TextIO

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_svd_distill.cli.options import Shown
from moe_svd_distill.cli.screen import console, duration
from moe_svd_distill.errors import CannotWriteError
from moe_svd_distill.execution import events

EVERY_S = 30.0


class _Display(Protocol):
    """Something that shows events between `start` and `stop`."""

    def start(self) -> None: ...

    def take(self, event: events.Event) -> None: ...

    def stop(self) -> None: ...


class Monitor:
    """Shows every event it is given, where it is asked to; used as a context. `on_event` is what a run is told of.

    Args:
        shown: Where and how much.

    Raises:
        CannotWriteError: The log file cannot be opened.
    """

    def __init__(self, shown: Shown | None = None) -> None:
        shown = shown or Shown()
        self._displays: list[_Display] = []
        if not (shown.quiet or shown.as_json):
            self._displays.append(_Bars() if console.is_terminal and sys.stderr.isatty() else Lines(_say))
            self._displays[-1] = _Verbose(self._displays[-1], _say) if shown.verbose else self._displays[-1]
        if shown.log_file is not None:
            self._displays.append(_Log(shown.log_file, shown.verbose))

    def __enter__(self) -> Monitor:
        for display in self._displays:
            display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for display in self._displays:
            display.stop()

    def on_event(self, event: events.Event) -> None:
        """Show an event."""
        for display in self._displays:
            display.take(event)

    def note(self, text: str) -> None:
        """Show a line."""
        self.on_event(events.Noted(text))

    def on_count(self, name: str, done: int, total: int) -> None:
        """Show a step, and how much of how much of it is done; of 0 where that is not known."""
        self.on_event(events.StageReached(name, done / total if total else None))


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


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


class _Verbose:
    """A display with the details as well."""

    def __init__(self, display: _Display, say: Callable[[str], None]) -> None:
        self._display, self._say = display, say
        self.start, self.stop = display.start, display.stop

    def take(self, event: events.Event) -> None:
        self._display.take(event)
        for line in details(event):
            self._say(line)


class _Log:
    """Lines with the time, at the end of a file."""

    def __init__(self, file: Path, verbose: bool) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream: TextIO = file.open("a", encoding="utf-8", errors="replace")
        except OSError as error:
            raise CannotWriteError(f"--log-file {file}: {error.strerror}", "Choose another --log-file") from error
        lines = Lines(self._write)
        self._display: _Display = _Verbose(lines, self._write) if verbose else lines
        self.start, self.take = self._display.start, self._display.take

    def stop(self) -> None:
        self._display.stop()
        self._stream.close()

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a full disk of logs ends no run
            self._stream.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")
            self._stream.flush()


class _Bars:
    """A bar for the units, one for each worker, and one for each later step."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.start, self.stop = self._progress.start, self._progress.stop
        self._costs: dict[str, int] = {}
        self._all: TaskID | None = None
        self._workers: dict[int, TaskID] = {}
        self._stage: tuple[str, TaskID] | None = None
        self._done = 0

    def take(self, event: events.Event) -> None:
        for line in messages(event):
            self._progress.console.print(line, highlight=False, soft_wrap=True, markup=False)
        match event:
            case events.StageReached(name, fraction):
                self._reached(name, fraction)
            case events.UnitsPlanned(units):
                self._costs = dict(units)
                total = sum(self._costs.values())
                self._all = self._progress.add_task(events.WEIGHTS_STAGE, total=total, note=f"0/{len(units)} units")
            case events.WorkerStarted(worker, device, _):
                if worker not in self._workers:
                    self._workers[worker] = self._progress.add_task(f"  worker {worker} on {device}", total=1, note="")
            case events.UnitStarted(worker, label, attempt):
                self._update_worker(worker, label if attempt == 1 else f"{label}, attempt {attempt}", 0.0)
            case events.UnitProgress(worker, label, fraction):
                self._update_worker(worker, label, fraction)
            case events.UnitFinished(worker, label):
                self._done += 1
                if self._all is not None:
                    note = f"{self._done}/{len(self._costs)} units"
                    self._progress.update(self._all, advance=self._costs.get(label, 0), note=note)
                if worker is not None:
                    self._update_worker(worker, label, 1.0)

    def _reached(self, name: str, fraction: float | None) -> None:
        if self._stage is None or self._stage[0] != name:
            if self._stage is not None:
                self._progress.update(self._stage[1], completed=1, total=1)
            self._stage = (name, self._progress.add_task(name, total=1 if fraction is not None else None, note=""))
        if fraction is not None:
            self._progress.update(self._stage[1], total=1, completed=fraction)

    def _update_worker(self, worker: int, note: str, fraction: float) -> None:
        if worker in self._workers:
            self._progress.update(self._workers[worker], completed=fraction, note=note)


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


class Lines:
    """Where nobody sees a bar: a line when a stage begins, and one every half minute while it lasts.

    Between `start` and `stop`, from a thread of its own.
    """

    def __init__(self, say: Callable[[str], None], every_s: float = EVERY_S) -> None:
        self._say, self._every_s = say, every_s
        self._stage: _Stage | None = None
        self._units = self._done = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self, event: events.Event) -> None:
        match event:
            case events.StageReached(name, fraction):
                self._reached(name, fraction)
            case events.UnitsPlanned(units):
                self._units, self._done = len(units), 0
                self._reached(events.WEIGHTS_STAGE, 0.0)
            case events.UnitFinished():
                self._done += 1
                self._reached(events.WEIGHTS_STAGE, self._done / max(1, self._units))
        for line in messages(event):
            self._say(line)

    def _reached(self, name: str, fraction: float | None) -> None:
        stage = self._stage
        if stage is None or stage.name != name:
            self._stage = _Stage(name, time.monotonic(), fraction or 0.0, fraction)
            self._say(name)
        else:
            self._stage = _Stage(name, stage.begin, stage.first, fraction)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            stage = self._stage
            if stage is not None:
                self._say(stage.line(time.monotonic()))
