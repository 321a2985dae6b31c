"""Lines where nobody sees a bar, log files, and tables that fit a terminal."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest

from moe_svd_distill.cli import lines, screen
from moe_svd_distill.cli.options import Shown
from moe_svd_distill.cli.progress import Monitor
from moe_svd_distill.cli.screen import duration, roughly
from moe_svd_distill.errors import CannotWriteError
from moe_svd_distill.execution import events


def test_durations_in_words() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 61, 7261)] == ["0 s", "59 s", "1 min 1 s", "2 h 1 min"]
    estimates = ["10 s", "80 s", "2 min", "89 min", "2 h 10 min"]
    assert [roughly(seconds) for seconds in (0.4, 84, 95, 5340, 7800)] == estimates


RUN: list[events.Event] = [
    events.Noted("resuming from out: 3 finished parts"),
    events.UnitsPlanned((("layer 0", 5), ("layer 1", 5))),
    events.WorkerStarted(0, "cpu", 4711),
    events.UnitStarted(0, "layer 0", 1),
    events.UnitFailed(0, "layer 0", 1, "out of memory"),
    events.UnitFinished(0, "layer 0", 3.2, reused=False, backoff=("computed on the CPU",)),
    events.UnitFinished(None, "layer 1", 0.0, reused=True),
    events.StageReached("training", 0.25),
]


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("verbose", [False, True])
def test_one_stream_of_events_feeds_screen_and_log(
    quiet: bool,
    verbose: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "logs" / "run.log"
    monkeypatch.setattr(lines, "SOON_S", 0.0)
    with Monitor(Shown(quiet=quiet, verbose=verbose, log_file=file)) as monitor:
        for event in RUN:
            monitor.on_event(event)
            for display in monitor._displays:
                looking = getattr(display, "_display", display)
                getattr(looking, "_display", looking).look()
    said = ["resuming from out", "weights stage", "attempt 1 failed: out of memory", "computed on the CPU", "training"]
    details = ["worker 0 on cpu, process 4711", "layer 0: 3 s", "layer 1: found on the disk"]
    captured, logged = capsys.readouterr(), file.read_text()
    assert captured.out == ""
    assert (captured.err == "") == quiet
    for words, wanted in ((said, True), (details, verbose)):
        assert [word in logged for word in words] == [wanted] * len(words)
        assert [word in captured.err for word in words] == [wanted and not quiet] * len(words)
    assert all(line[:4].isdigit() and "T" in line[:20] for line in logged.splitlines())
    with Monitor(Shown(as_json=True, log_file=file)) as monitor:
        monitor.note("again")
    assert file.read_text().startswith(logged)
    assert capsys.readouterr().err == ""


def test_a_log_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotWriteError, match="--log-file"):
        Monitor(Shown(log_file=tmp_path))


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_and_figures_stay_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(screen, "output", screen._Console(file=stream, width=width))
    row = (
        "a name that goes on and on, longer than any table could take, [bold]",
        "-123.456 … +7.890",
        "1,234,567",
        "99.9 %",
    )
    screen.print_table("title", ("", "figure", "count", "share"), [row] * 2)
    screen.print_facts("facts", [("key", "words " * 40), ("another", "/a/path/" * 30)])
    assert max(map(len, stream.getvalue().splitlines())) <= width
    assert all(figure in stream.getvalue() for figure in row[1:])
    assert "[bold]" in stream.getvalue()


@pytest.mark.parametrize("width", [40, 80, 400])
def test_the_next_command_can_be_copied_from_a_terminal_of_any_width(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    console = screen._Console(file=stream, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(screen, "output", console)
    words = ["distill", "--teacher", "models/a teacher", "--student", "models/a-student", "--output", "somewhere/else"]
    screen.print_next(*words, note="with more text")
    assert max(map(len, stream.getvalue().splitlines())) <= width
    command = stream.getvalue().removeprefix("Next, with more text:").replace("\\\n", "")  # as a shell reads it
    assert shlex.split(command) == ["moe-svd-distill", *words]


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_are_broken_between_words_on_a_terminal_alone(terminal: bool) -> None:
    stream = io.StringIO()
    console = screen._Console(file=stream, width=40, force_terminal=terminal, color_system=None)
    screen.say(console, "several words that take more than forty letters [bold]")
    lines = stream.getvalue().splitlines()
    assert len(lines) == (2 if terminal else 1)
    assert " ".join(line.strip() for line in lines) == "several words that take more than forty letters [bold]"
