"""Worker processes for tests that need many of them, from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.execution import processes
from moe_svd_distill.execution.events import Event
from moe_svd_distill.execution.supervisor import ExecutionSettings, ExecutionSummary, execute
from tests.support.workload import ToyUnit, ToyWork, consolidated, toy_units


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that start in a few milliseconds. The product spawns; tests that are about starting do so too."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "tests.support.workload"])
    monkeypatch.setattr(processes, "START_METHOD", "forkserver")


@dataclass
class Runner:
    """Runs toy units in a folder of its own and remembers the events."""

    folder: Path
    events: list[Event] = field(default_factory=list)

    @property
    def parts(self) -> Path:
        return self.folder / "parts"

    def run(
        self,
        units: Sequence[ToyUnit] | int = 6,
        *,
        workers: int = 2,
        listen: Callable[[Event], None] | None = None,
        settings: dict[str, Any] | None = None,
        **work: Any,
    ) -> ExecutionSummary:
        def on_event(event: Event) -> None:
            self.events.append(event)
            if listen:
                listen(event)

        self.events.clear()
        wanted = toy_units(units) if isinstance(units, int) else units
        toy = ToyWork(self.folder / "journal", **work)
        return execute(wanted, toy, self.parts, ExecutionSettings(workers, **(settings or {})), on_event)

    def digest(self, summary: ExecutionSummary) -> str:
        return consolidated(list(summary.parts.values()), self.folder / "adapter.safetensors")

    def begun(self) -> list[str]:
        """The label of every unit that any process has begun."""
        journal = self.folder / "journal"
        return [line.split("\t")[0] for line in journal.read_text().splitlines()] if journal.exists() else []

    def seen(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.fixture
def make_runner(tmp_path: Path) -> Callable[[str], Runner]:
    def make(name: str) -> Runner:
        (tmp_path / name).mkdir()
        return Runner(tmp_path / name)

    return make
