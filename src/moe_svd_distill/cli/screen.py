"""What people see: progress while it runs, tables when it is done; quiet when not on a terminal."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moe_svd_distill.execution import events

EVERY_S = 30.0


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a closed pipe to `main`; by default the program would end with code 1."""
        raise BrokenPipeError


console = _Console(stderr=True)
# Where nobody looks, a table must not be squeezed into 80 columns.
output = _Console(width=None if sys.stdout.isatty() else 140)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def grouped(reasons: Mapping[str, str]) -> Iterator[str]:
    """A line for each tensor and its reason; tensors that differ in one number only, such as experts, share one."""
    counts: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        pattern = re.sub(r"(?<=experts\.)\d+(?=\.)|(?<=\[)\d+(?=\])", "*", name)
        counts.setdefault((pattern, reason), []).append(name)
    for (pattern, reason), names in counts.items():
        yield f"{names[0]}: {reason}" if len(names) == 1 else f"{pattern} ({len(names)}): {reason}"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output; the first column is left-aligned, the others right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    output.print(table)


def print_line(text: str) -> None:
    """A line on standard output, as long as it is."""
    output.print(text, soft_wrap=True, highlight=False)


class Monitor:
    """Draws the units, the workers and the later stages of a run; used as a context."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._costs: dict[str, int] = {}
        self._all: TaskID | None = None
        self._workers: dict[int, TaskID] = {}
        self._stage: tuple[str, TaskID] | None = None
        self._done = 0
        self._lines = None if quiet or console.is_terminal else ProgressLines(self.say)

    def __enter__(self) -> Monitor:
        self._progress.start()
        if self._lines is not None:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._lines is not None:
            self._lines.stop()

    def on_plan(self, units: list[tuple[str, int]]) -> None:
        """Units and their costs, before work begins."""
        self._costs = dict(units)
        self._all = self._progress.add_task("distilling", total=sum(self._costs.values()), note=f"0/{len(units)} units")

    def on_event(self, event: events.Event) -> None:
        """An event of the workers."""
        match event:
            case events.WorkerStarted(worker, device, _):
                if worker not in self._workers:
                    self._workers[worker] = self._progress.add_task(f"  worker {worker} on {device}", total=1, note="")
            case events.UnitStarted(worker, label, attempt):
                note = label if attempt == 1 else f"{label}, attempt {attempt}"
                self._update_worker(worker, note, 0.0)
            case events.UnitProgress(worker, label, fraction):
                self._update_worker(worker, label, fraction)
            case events.UnitFinished(worker, label, _, reused, backoff):
                self._finish(worker, label, reused)
                for step in backoff:
                    self.say(f"{label}: {step}")
            case events.UnitFailed(_, label, attempt, reason, _):
                self.say(f"{label}: attempt {attempt} failed: {reason}")
            case events.UnitSetAside(label, reason):
                self.say(f"{label}: set aside: {reason}")
            case events.WorkerLost(worker, reason, label):
                self.say(f"worker {worker} lost{f' with {label}' if label else ''}: {reason}")
            case events.PartRejected(label, reason, moved_to):
                self.say(
                    f"{label}: the part on disk is damaged ({reason}); moved to {moved_to.name}, computing it again"
                )

    def on_stage(self, name: str, fraction: float | None = None) -> None:
        """A stage after the units; fraction is None where it cannot be known."""
        if self._lines is not None:
            self._lines.reached(name, fraction)
        if self._stage is None or self._stage[0] != name:
            if self._stage is not None:
                self._progress.update(self._stage[1], completed=1, total=1)
            self._stage = (name, self._progress.add_task(name, total=1 if fraction is not None else None, note=""))
        if fraction is not None:
            self._progress.update(self._stage[1], total=1, completed=fraction)

    def on_count(self, name: str, done: int, total: int) -> None:
        """A stage, and how much of how much is done."""
        self.on_stage(name, done / max(1, total))

    def say(self, text: str) -> None:
        """A line for people on standard error."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)

    def _update_worker(self, worker: int, note: str, fraction: float) -> None:
        if worker in self._workers:
            self._progress.update(self._workers[worker], completed=fraction, note=note)

    def _finish(self, worker: int | None, label: str, reused: bool) -> None:
        self._done += 1
        if self._lines is not None:
            self._lines.reached("distilling", self._done / max(1, len(self._costs)))
        if self._all is not None:
            note = f"{self._done}/{len(self._costs)} units"
            self._progress.update(self._all, advance=self._costs.get(label, 0), note=note)
        if worker is not None:
            self._update_worker(worker, label, 1.0)


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
    """Where nobody sees a bar: a line when a stage begins, and one every half minute while it lasts.

    Between `start` and `stop`, from a thread of its own.
    """

    def __init__(self, say: Callable[[str], None], every_s: float = EVERY_S) -> None:
        self._say, self._every_s = say, every_s
        self._stage: _Stage | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
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
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            stage = self._stage
            if stage is not None:
                self._say(stage.line(time.monotonic()))


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
