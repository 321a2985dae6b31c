"""The entry point: finds the command, and turns every failure into one line and an exit code."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from types import FrameType

import click

from moe_svd_distill.errors import DistillError, UsageError
from moe_svd_distill.execution.processes import Terminated

# Command to the module and the function that hold it, and one line of help: --help imports no command.
COMMANDS = {
    "demo": ("distill:demo_command", "Distil the bundled lab pairs, evaluate, and show what the adapters do."),
    "init": ("recipe:init_command", "Write a recipe for a teacher and a student, every key explained."),
    "inspect": (
        "inspect:inspect_command",
        "Show what a model is, from its headers only; with a second model, how the two are related.",
    ),
    "plan": ("plan:command", "Show everything that distill would do, and what it takes, before any work."),
    "distill": (
        "distill:distill_command",
        "Make a LoRA adapter for the student from the teacher; resumes by default.",
    ),
    "evaluate": ("evaluate:command", "Measure what an adapter does on held-out text, beside controls."),
    "verify": ("adapter:verify_command", "Check an adapter's files and that PEFT really loads them."),
    "merge": ("adapter:merge_command", "Write the student with the adapter merged in, shard by shard."),
    "export": (
        "adapter:export_command",
        "Write an adapter in another layout, or for the student's class for text alone.",
    ),
    "push": ("push:command", "Send an adapter's own files to a repository of the hub, private unless asked."),
    "chat": ("chat:command", "Talk to the student with its adapter, without it, or side by side."),
    "reproduce": ("reproduce:command", "Run an adapter's recipe again elsewhere, and compare bytes and figures."),
    "adapter-config": (
        "adapter:adapter_config_command",
        "Rebuild adapter_config.json from an adapter's header alone.",
    ),
    "clean": ("distill:clean_command", "Delete the working files of a finished run."),
    "schema": ("recipe:schema_command", "Print the JSON schema of recipes: every key, what it takes, its default."),
    "completion": ("recipe:completion_command", "Print what a shell needs to complete commands and options."),
}
PROGRAM = "moe-svd-distill"
COMPLETE_VARIABLE = "_MOE_SVD_DISTILL_COMPLETE"
_RESUMES = ("demo", "distill", "evaluate", "reproduce")
INTERNAL_ERROR = 70
INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 141  # what a shell reports of a program that a closed pipe has ended


class StoppedError(DistillError):
    """Ctrl-C or SIGTERM: `exit_code` is what shells report of a program that the signal has ended.

    Notes of the interrupt say what of the work in hand is kept.
    """

    def __init__(self, command: str, stop: KeyboardInterrupt) -> None:
        self.exit_code = getattr(stop, "exit_code", INTERRUPTED)
        kept = ("finished parts are kept", *getattr(stop, "__notes__", ()), "run the same command again")
        Exception.__init__(self, f"stopped: {'; '.join(kept)}" if command in _RESUMES else "stopped")


class LazyGroup(click.Group):
    """Imports the module of a command only when the command is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def resolve_command(
        self, context: click.Context, words: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = words[0]
        if name in COMMANDS or name.startswith("-"):
            return super().resolve_command(context, words)
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        raise UsageError(
            f"there is no command {name!r}", f"Did you mean {near[0]!r}?" if near else f"Try: {PROGRAM} --help"
        )

    def invoke(self, context: click.Context) -> object:
        """Here and not in `main`, because click would make something else of an interrupt, with an empty line."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as stop:
            raise StoppedError(context.invoked_subcommand or "", stop) from None

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, function = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"moe_svd_distill.cli.commands.{module}"), function)
        command.help = (command.help or "").replace("\n\nExample:", "\n\n\b\nExample:")  # \b: not to be folded
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=PROGRAM, prog_name=PROGRAM)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def program(debug: bool) -> None:
    """Move what a large teacher LLM knows into a smaller student LLM, as a LoRA adapter with measured figures.

    Example: moe-svd-distill demo
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    as_json = "--json" in words
    _prepare_environment()
    _write_what_the_terminal_can()
    if not debug:
        # Deprecations of libraries, and PEFT's false alarm about rank_pattern keys, are nothing a user could act on.
        warnings.simplefilter("ignore")
    try:
        code = _run([word for word in words if word != "--debug"], as_json, debug)
        sys.stdout.flush()
    except BrokenPipeError:
        code = _leave_the_pipe()
    sys.exit(code)


def _run(words: list[str], as_json: bool, debug: bool) -> int:
    """Run a command and report its failure; the exit code."""
    try:
        with _terminated_by_sigterm():
            return int(
                program.main(
                    args=words,
                    prog_name=PROGRAM,
                    complete_var=COMPLETE_VARIABLE,
                    standalone_mode=False,
                    obj=tuple(words),
                )
                or 0
            )
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.ClickException as error:
        return _report(_of_click(error), error.exit_code, as_json)
    except DistillError as error:
        return _report(str(error), error.exit_code, as_json, debug)
    except (KeyboardInterrupt, click.Abort) as stop:  # before a command began
        return _report("stopped", getattr(stop, "exit_code", INTERRUPTED), as_json)
    except BrokenPipeError:
        raise
    except SystemExit:  # how click leaves a shell's completion and a closed pipe, and nothing else
        if COMPLETE_VARIABLE in os.environ:
            return 0
        raise BrokenPipeError from None
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _report(
            f"Internal error: {text}. Run again with --debug and report what it prints.", INTERNAL_ERROR, as_json, debug
        )


def _of_click(error: click.ClickException) -> str:
    """What click found wrong, and the help of the command that was meant; of a value, in the words of a recipe's."""
    if isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter) and error.param:
        return f"the command line: {error.param.opts[0]}: {error.message.rstrip('.')}. Correct that value."
    message = error.format_message()
    message += "" if message.endswith((".", "?", ")")) else "."
    if not isinstance(error, click.UsageError) or "Did you mean" in message:
        return message
    return f"{message} Try: {error.ctx.command_path if error.ctx else PROGRAM} --help"


@contextmanager
def _terminated_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a command like Ctrl-C; where it is ignored or handled already it stays so."""
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _write_what_the_terminal_can() -> None:
    """A letter that the terminal's encoding lacks, or a file name that is no text, must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _leave_the_pipe() -> int:
    """Let what is still buffered go nowhere, or the interpreter complains about it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    return NOBODY_READS


def _report(message: str, code: int, as_json: bool, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    if as_json:
        click.echo(json.dumps({"error": message, "exit_code": code}))
    else:
        click.echo(f"{PROGRAM}: {message}", err=True)
    return code


def _prepare_environment() -> None:
    """What libraries read when they are imported, here and in workers; whatever is set already stays."""
    defaults = {
        # Threads that spin without end make everything up to ten times slower where cores are shared; those that sleep
        # at once make the short operations of training a third slower. So they spin for about a millisecond.
        "GOMP_SPINCOUNT": "100000",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
