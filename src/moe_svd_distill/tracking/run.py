"""A run as trackers see it: the same one whenever it goes on, every point of its curves once, failures said once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.errors import DistillError, MissingInputError, UsageError, shown
from moe_svd_distill.execution.events import (
    WEIGHTS_STAGE,
    Event,
    Listener,
    Measured,
    Noted,
    StageReached,
    UnitsPlanned,
)
from moe_svd_distill.files.names import TRACKING_FILE
from moe_svd_distill.files.typed import read_as
from moe_svd_distill.files.writing import write_json
from moe_svd_distill.tracking.trackers import TRACKERS, RunPlace, Tracker, reason_without_key


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose library is not installed.

    Raises:
        MissingInputError: It is not.
        UsageError: There is no tracker of that name.
    """
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"report_to: found {shown(name)}, expected {' or '.join(TRACKERS)}", "Correct the name")
        found = find_spec(name)
        if found is None or found.origin is None:  # such as a folder `wandb` of earlier runs
            raise MissingInputError(
                f"report_to: {name} needs a library (found no {name})",
                f"Install the extra: pip install 'moe-svd-distill[{name}]'",
            )


@contextmanager
def tracked(
    names: Sequence[str], folder: Path, tell: Listener, configuration: Mapping[str, object] | None = None
) -> Iterator[Listener]:
    """A listener that tells trackers as well; no failure of theirs gets out of it, each is noted once.

    Args:
        names: Of the trackers.
        folder: Of the adapter, where the run's identity is kept.
        tell: Told everything, and what fails.
        configuration: What is asked for; another one makes another run. None goes on with the run that is there.
    """
    if not names:
        yield tell
        return
    run = _TrackedRun(names, folder, tell, configuration)
    try:
        yield run.take
    except BaseException:
        run.close(failed=True)
        raise
    run.close(failed=False)


@dataclass
class _State:
    """What is kept of a run between processes."""

    run: str
    asked: str
    logged: dict[str, dict[str, int]] = field(default_factory=dict)  # tracker -> part -> last step
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> of all processes

    @classmethod
    def in_folder(cls, folder: Path, configuration: Mapping[str, object] | None) -> _State:
        asked = hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode()).hexdigest()[:16]
        with suppress(DistillError):
            found = read_as(cls, read_json(folder / TRACKING_FILE))
            if found.run and (configuration is None or found.asked == asked):
                return found
        return cls(uuid4().hex[:12], asked)


class _TrackedRun:
    def __init__(
        self, names: Sequence[str], folder: Path, tell: Listener, configuration: Mapping[str, object] | None
    ) -> None:
        self._tell, self._file = tell, folder / TRACKING_FILE
        self._state = _State.in_folder(folder, configuration)
        self._stage: tuple[str, float] | None = None
        self._trackers: dict[str, Tracker] = {}
        place = RunPlace(self._state.run, folder, configuration or {}, lambda text: tell(Noted(text)))
        for name in names:
            self._try(name, lambda name: self._trackers.update({name: TRACKERS[name](place)}))
        self._save()

    def take(self, event: Event) -> None:
        """Pass an event on, and tell the trackers what of it they take."""
        self._tell(event)
        match event:
            case StageReached(name):
                self._reach(name)
            case UnitsPlanned():
                self._reach(WEIGHTS_STAGE)
            case Measured(part, figures, step):
                self._write(part, figures, step)

    def close(self, *, failed: bool) -> None:
        """End; of a run that failed trackers know that."""
        self._reach(None)
        for name in list(self._trackers):
            self._try(name, lambda name: self._trackers[name].close(failed=failed))

    def _reach(self, name: str | None) -> None:
        """The stage before this one is over, if it is another."""
        before, now = self._stage, time.monotonic()
        if before is not None and before[0] == name:
            return
        self._stage = None if name is None else (name, now)
        if before is not None:
            seconds = self._state.seconds
            seconds[before[0]] = round(seconds.get(before[0], 0.0) + now - before[1], 2)
            self._write("seconds", {before[0]: seconds[before[0]]}, None)

    def _write(self, part: str, figures: Mapping[str, float], step: int | None) -> None:
        for name in list(self._trackers):
            logged = self._state.logged.setdefault(name, {})
            if step is not None and step <= logged.get(part, -1):
                continue  # of a process before this one, which was killed after its last save
            self._try(name, lambda name: self._trackers[name].write(part, figures, step))
            if step is not None:
                logged[part] = step
        self._save()

    def _try(self, name: str, action: Callable[[str], object]) -> None:
        """A tracker never stops a run: one that fails is told of, and nothing is sent to it any more."""
        try:
            action(name)
        except Exception as error:
            self._trackers.pop(name, None)
            self._tell(Noted(f"report_to: {name} failed and gets nothing any more ({reason_without_key(error)})"))

    def _save(self) -> None:
        with suppress(DistillError, OSError):  # a full disk is told by what the run itself writes
            write_json(self._file, asdict(self._state))
