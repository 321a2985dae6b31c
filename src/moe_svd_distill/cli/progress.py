"""What people see while a command runs: bars on a terminal, lines elsewhere, and the same lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol, TextIO

from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_svd_distill.cli.lines import Lines, details, messages
from moe_svd_distill.cli.options import Shown
from moe_svd_distill.cli.screen import console, say
from moe_svd_distill.errors import CannotWriteError
from moe_svd_distill.execution import events

BAR = 20
"""Letters of a bar; where a name is long, fewer, and none below `LEAST_BAR`."""
LEAST_BAR = 4


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
        self.on_event(events.StageReached.counted(name, done, total))


def _say(text: str) -> None:
    say(console, text)


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


class _Row(ProgressColumn):
    """A whole row: what is done, a bar, the time taken and the time left. The bar gives way to long names."""

    def render(self, task: Task) -> Table:
        times = f"{_clock(task.finished_time if task.finished else task.elapsed)} {_clock(task.time_remaining)}"
        room = console.width - len(times) - 2
        said = f"{task.description}  {task.fields['note']}".rstrip()
        bar = min(BAR, room - len(said))
        row = Table.grid(padding=(0, 1, 0, 0))
        if bar < LEAST_BAR:
            row.add_row(Text(said[:room].ljust(room + 1), no_wrap=True), Text(times))
        else:
            drawn = ProgressBar(task.total, task.completed, width=bar, pulse=task.total is None)
            row.add_row(Text(said.ljust(room - bar), no_wrap=True), drawn, Text(times))
        return row


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds))).rjust(7)


class _Bars:
    """A bar for the units, one for each worker, and one for each later step."""

    def __init__(self) -> None:
        self._progress = Progress(_Row(), console=console)
        self.start, self.stop = self._progress.start, self._progress.stop
        self._costs: dict[str, int] = {}
        self._all: TaskID | None = None
        self._workers: dict[int, TaskID] = {}
        self._stage: tuple[str, TaskID] | None = None
        self._done = 0

    def take(self, event: events.Event) -> None:
        for line in messages(event):
            say(self._progress.console, line)
        match event:
            case events.StageReached(name, fraction, amount):
                self._reached(name, fraction, amount)
            case events.UnitsPlanned(units):
                self._end_stage()
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

    def _reached(self, name: str, fraction: float | None, amount: str) -> None:
        if self._stage is None or self._stage[0] != name:
            self._end_stage()
            self._stage = (name, self._progress.add_task(name, total=1 if fraction is not None else None, note=""))
        if fraction is not None:
            self._progress.update(self._stage[1], total=1, completed=fraction, note=amount)

    def _end_stage(self) -> None:
        if self._stage is not None:
            self._progress.update(self._stage[1], completed=1, total=1)
            self._stage = None

    def _update_worker(self, worker: int, note: str, fraction: float) -> None:
        if worker in self._workers:
            self._progress.update(self._workers[worker], completed=fraction, note=note)
