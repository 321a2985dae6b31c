"""Units are done, whatever happens to the processes that do them."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_svd_distill.errors import BadDataError, CannotWriteError, IncompleteError
from moe_svd_distill.execution import events, pool
from moe_svd_distill.execution.parts import part_path, read_record
from moe_svd_distill.execution.supervisor import ExecutionSettings, UnitsSetAsideError, execute
from tests.execution.conftest import Runner
from tests.support.workload import UnloadableWork, toy_units


def test_bytes_do_not_depend_on_the_workers(
    make_runner: Callable[[str], Runner], request: pytest.FixtureRequest
) -> None:
    """One and two spawned workers, as in the product, of which one is killed; then one, two and three quick ones."""
    digests = set()
    for name, workers, troubles in (
        ("one", 1, {}),
        ("two", 2, {"layer 5": "kill"}),
        ("quick one", 1, {}),
        ("quick two", 2, {}),
        ("quick three", 3, {}),
    ):
        if name == "quick one":
            request.getfixturevalue("quick_workers")
        runner = make_runner(name)
        summary = runner.run(workers=workers, seconds=0.2, troubles=troubles)
        assert (summary.computed, summary.reused, len(summary.parts)) == (6, 0, 6)
        assert len(runner.seen(events.WorkerLost)) == len(troubles)
        assert summary.peak_memory
        assert all(peak > 1_000_000 for peak in summary.peak_memory.values())
        digests.add((runner.digest(summary), *(path.read_bytes() for path in summary.parts.values())))
    assert len(digests) == 1


@pytest.mark.usefixtures("quick_workers")
class TestQuickly:
    def test_every_kind_of_trouble(self, make_runner: Callable[[str], Runner]) -> None:
        """Killed, hung, frozen, failing, leaving with exit code 0: each unit is done in the end, the bytes the same."""
        calm, stormy = make_runner("calm"), make_runner("stormy")
        expected = calm.digest(calm.run(5))
        troubles = {"layer 0": "kill", "layer 1": "hang", "layer 2": "freeze", "layer 3": "raise", "layer 4": "exit"}
        summary = stormy.run(5, troubles=troubles, settings={"heartbeat_limit_s": 1.5})
        assert stormy.digest(summary) == expected
        assert sorted(event.label for event in stormy.seen(events.UnitFailed)) == sorted(troubles)
        assert len(stormy.seen(events.WorkerLost)) == 4
        assert summary.computed == 5

    def test_a_second_run_starts_no_process(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        runner.run()
        monkeypatch.setattr(pool.WorkerPool, "hire", None)
        summary = runner.run()
        assert (summary.computed, summary.reused) == (0, 6)
        assert [event.reused for event in runner.seen(events.UnitFinished)] == [True] * 6
        assert len(runner.begun()) == 6

    def test_only_what_is_missing_is_computed(self, runner: Runner) -> None:
        runner.run(4)
        summary = runner.run(6)
        assert (summary.computed, summary.reused) == (2, 4)
        assert Counter(runner.begun()) == Counter(unit.label for unit in toy_units(6))

    def test_other_units_leave_the_parts_of_these_alone(self, runner: Runner) -> None:
        first = runner.run(3)
        runner.run(toy_units(3, salt="other"))
        assert all(path.exists() for path in first.parts.values())

    def test_no_more_processes_than_units(self, runner: Runner) -> None:
        runner.run(1, workers=8)
        assert len(runner.seen(events.WorkerStarted)) == 1

    def test_heavy_units_go_first(self, runner: Runner) -> None:
        runner.run(6, workers=1)
        assert runner.begun() == [f"layer {index}" for index in (2, 5, 1, 4, 0, 3)]

    def test_progress_is_told(self, runner: Runner) -> None:
        runner.run(1, workers=1, seconds=2.4)
        assert 2 <= len(runner.seen(events.UnitProgress)) <= 4

    def test_a_hung_worker_is_found_in_time(self, runner: Runner) -> None:
        begun = time.monotonic()
        lost: list[float] = []

        def listen(event: events.Event) -> None:
            if isinstance(event, events.UnitStarted) and event.attempt == 1:
                lost.append(-time.monotonic())
            if isinstance(event, events.WorkerLost):
                lost.append(time.monotonic())

        runner.run(1, workers=1, troubles={"layer 0": "hang"}, settings={"heartbeat_limit_s": 0.5}, listen=listen)
        assert 0.5 <= sum(lost) < 1.5
        assert "no sign of life for 0.5 s" in runner.seen(events.WorkerLost)[0].reason
        assert time.monotonic() - begun < 20

    def test_a_slow_listener_is_not_taken_for_hung_workers(self, runner: Runner) -> None:
        def listen(event: events.Event) -> None:
            if isinstance(event, events.UnitStarted):
                time.sleep(1.2)

        runner.run(2, listen=listen, settings={"heartbeat_limit_s": 1.0})
        assert runner.seen(events.WorkerLost) == []

    def test_a_unit_that_always_fails_is_set_aside(self, runner: Runner) -> None:
        with pytest.raises(UnitsSetAsideError, match="Run the same command again") as caught:
            runner.run(5, troubles={"layer 2": "raise"}, times=9)
        error = caught.value
        assert error.exit_code == 75
        assert "layer 2" in str(error)
        assert "\n" not in str(error)
        assert error.summary is not None
        assert error.summary.failed == {"layer 2": "ValueError: singular"}
        assert (error.summary.computed, len(error.summary.parts)) == (4, 4)
        assert Counter(runner.begun())["layer 2"] == 3
        assert "Traceback" in runner.seen(events.UnitFailed)[0].detail
        assert runner.run(5).computed == 1

    def test_a_last_attempt_has_the_machine_to_itself(self, runner: Runner) -> None:
        held: set[str] = set()
        beside: list[set[str]] = []

        def listen(event: events.Event) -> None:
            if isinstance(event, events.UnitStarted):
                held.add(event.label)
                if event.attempt == 3:
                    beside.append(held - {event.label})
            if isinstance(event, events.UnitFinished | events.UnitFailed):
                held.discard(event.label)

        runner.run(5, workers=3, seconds=0.3, troubles={"layer 1": "kill", "layer 4": "memory"}, times=2, listen=listen)
        assert beside == [set(), set()]

    def test_bad_data_stops_the_run_and_comes_back_as_it_was(self, runner: Runner) -> None:
        with pytest.raises(BadDataError, match="3 NaN values") as caught:
            runner.run(troubles={"layer 2": "nan"}, times=9)
        assert type(caught.value) is BadDataError
        assert caught.value.action == "Use --nan skip or zero"
        assert Counter(runner.begun())["layer 2"] == 1
        assert "workload.py" in caught.value.__notes__[0]

    def test_a_full_disk_that_a_library_reports_stops_the_run(self, runner: Runner) -> None:
        with pytest.raises(CannotWriteError, match=r"disk is full.*run the same command again") as caught:
            runner.run(troubles={"layer 2": "disk"})
        assert caught.value.exit_code == 73

    def test_an_interrupt_of_a_child_alone_changes_nothing(self, runner: Runner) -> None:
        assert runner.run(2, troubles={"layer 0": "interrupt"}).computed == 2
        assert runner.seen(events.WorkerLost) == []

    def test_device_memory_runs_out_once(self, runner: Runner) -> None:
        settings = {"devices": ("toy:3",)}
        summary = runner.run(1, troubles={"layer 0": "device memory"}, times=1, settings=settings)
        record = read_record(*summary.parts.values())
        assert record["device"] == "toy"
        assert record["backoff"] == ["freed the device's cache and tried again"]

    def test_device_memory_runs_out_for_good(self, runner: Runner) -> None:
        settings = {"devices": ("toy:3",)}
        summary = runner.run(1, troubles={"layer 0": "device memory"}, times=9, settings=settings)
        record = read_record(*summary.parts.values())
        assert record["device"] == "cpu"
        assert record["backoff"] == ["freed the device's cache and tried again", "computed on the CPU"]
        assert runner.seen(events.UnitFinished)[0].backoff == tuple(record["backoff"])
        assert [line.split("\t")[2] for line in (runner.folder / "journal").read_text().splitlines()] == [
            "toy:3", "toy:3", "cpu",
        ]  # fmt: skip

    @pytest.mark.parametrize("threads", [1, 2])
    def test_threads_are_what_was_asked_for(self, runner: Runner, threads: int) -> None:
        summary = runner.run(1, settings={"threads_per_worker": threads})
        assert read_record(*summary.parts.values())["threads"] == threads

    @pytest.mark.parametrize("damage", ["flip", "truncate", "zero tail", "other unit", "empty", "longer"])
    def test_a_damaged_part_is_moved_aside_and_computed_again(self, runner: Runner, damage: str) -> None:
        summary = runner.run(3)
        digest = runner.digest(summary)
        path = part_path(runner.parts, toy_units(3)[1].key)
        data = bytearray(path.read_bytes())
        match damage:
            case "flip":
                data[-100] ^= 4
            case "truncate":
                del data[-1:]
            case "zero tail":
                data[-200:] = bytes(200)
            case "other unit":
                data[:] = part_path(runner.parts, toy_units(3)[0].key).read_bytes()
            case "empty":
                data.clear()
            case "longer":
                data += b"\0"
        path.write_bytes(data)
        again = runner.run(3)
        assert (again.computed, again.reused) == (1, 2)
        (rejected,) = runner.seen(events.PartRejected)
        assert rejected.label == "layer 1"
        assert rejected.moved_to.read_bytes() == data
        assert re.search(r"\.rejected-1$", rejected.moved_to.name)
        assert runner.digest(again) == digest

    def test_work_that_no_worker_can_load(self, tmp_path: Path) -> None:
        work = UnloadableWork(ImportError("no module named teacher"))
        with pytest.raises(RuntimeError, match="cannot load the work: ImportError: no module named teacher"):
            execute(toy_units(2), work, tmp_path, ExecutionSettings(2), lambda event: None)

    def test_work_that_finds_bad_data_when_it_is_loaded(self, tmp_path: Path) -> None:
        work = UnloadableWork(BadDataError("Shard 3 is truncated", "Download it again"))
        with pytest.raises(BadDataError, match=r"Shard 3 is truncated\. Download it again"):
            execute(toy_units(2), work, tmp_path, ExecutionSettings(2), lambda event: None)

    def test_workers_that_die_at_once(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool, "run_worker", exit)
        with pytest.raises(IncompleteError, match="No worker process can start"):
            runner.run(2)

    def test_a_listener_that_raises_leaves_no_process(self, runner: Runner) -> None:
        def listen(event: events.Event) -> None:
            if isinstance(event, events.UnitStarted):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            runner.run(2, seconds=30, listen=listen)
        assert not _children()


def test_units_with_one_key_are_refused(runner: Runner) -> None:
    with pytest.raises(ValueError, match="same key"):
        runner.run([*toy_units(1), *toy_units(1)])


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"threads_per_worker": 0}, {"attempts": 0}, {"devices": ()}])
def test_settings_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        ExecutionSettings(**({"workers": 1} | wrong))  # type: ignore[arg-type]


def test_a_folder_that_is_a_file(runner: Runner) -> None:
    runner.parts.write_text("")
    with pytest.raises(CannotWriteError, match="is a file"):
        runner.run(1)


def _children() -> list[int]:
    import multiprocessing

    return [child.pid or 0 for child in multiprocessing.active_children()]
