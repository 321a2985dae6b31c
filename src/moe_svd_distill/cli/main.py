"""The entry point: finds the command, and turns every failure into one line and an exit code."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import traceback
import warnings
from contextlib import suppress

import click

from moe_svd_distill.errors import DistillError

# Command to the module and the function that hold it, and one line of help: --help imports no command.
COMMANDS = {
    "demo": ("distill:demo_command", "Distil the bundled lab pairs, evaluate, and show what the adapters do."),
    "init": ("distill:init_command", "Write a recipe for a teacher and a student, every key explained."),
    "inspect": (
        "inspect:inspect_command",
        "Show what a model is, from its headers only; with a second model, how the two are related.",
    ),
    "plan": ("plan:command", "Show what a recipe would do to every tensor, before any work."),
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
    "adapter-config": (
        "adapter:adapter_config_command",
        "Rebuild adapter_config.json from an adapter's header alone.",
    ),
    "clean": ("distill:clean_command", "Delete the working files of a finished run."),
}
INTERNAL_ERROR = 70
INTERRUPTED = 130
NOBODY_READS = 141  # what a shell reports of a program that a closed pipe has ended


class LazyGroup(click.Group):
    """Imports the module of a command only when the command is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, function = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"moe_svd_distill.cli.commands.{module}"), function)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="moe-svd-distill", prog_name="moe-svd-distill")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def program(debug: bool) -> None:
    """Move what a large teacher LLM knows into a smaller student LLM, as a LoRA adapter with measured figures."""


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
        program.main(args=words, standalone_mode=False)
        return 0
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        hint = "" if not isinstance(error, click.UsageError) else " Try: moe-svd-distill --help"
        return _report(error.format_message().rstrip(".") + "." + hint, error.exit_code, as_json)
    except DistillError as error:
        return _report(str(error), error.exit_code, as_json, debug)
    except KeyboardInterrupt as stop:
        return _report(
            "Stopped. Finished parts are kept; run the same command again to go on.",
            getattr(stop, "exit_code", INTERRUPTED),
            as_json,
        )
    except BrokenPipeError:
        raise
    except SystemExit:  # how click leaves a closed pipe, and nothing else
        raise BrokenPipeError from None
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _report(
            f"Internal error: {text}. Run again with --debug and report what it prints.", INTERNAL_ERROR, as_json, debug
        )


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
        click.echo(f"moe-svd-distill: {message}", err=True)
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
