"""chat: talk to the student with its adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_svd_distill.cli.options import Number, json_option

if TYPE_CHECKING:
    from moe_svd_distill.pipeline.chat import Speaker

_NAMES: dict[Speaker, str] = {"student": "student", "adapted": "with the adapter"}


@click.command("chat", short_help="Talk to the student with its adapter.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--student", help="Folder or hub id of the student; default: the one the adapter was made for.")
@click.option("--untouched", is_flag=True, help="The student without the adapter.")
@click.option("--side-by-side", is_flag=True, help="The student without the adapter and with it.")
@click.option("--tokens", type=Number(min=1), default=256, show_default=True, help="Of an answer, at most.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0: the likeliest token at a time; above: drawn.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@click.option("--raw", is_flag=True, help="Go on with the prompt as it is, without the chat template.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@json_option
def command(
    folder: Path,
    student: str | None,
    untouched: bool,
    side_by_side: bool,
    as_json: bool,
    device: str,
    raw: bool,
    **given: float,
) -> None:
    """Talk to the student with the adapter in FOLDER; the student must fit in memory.

    Prompts come from the terminal, or one a line from standard input; then each is answered by itself. A tokenizer's
    chat template is used where there is one, otherwise the text is gone on with.

    Example: moe-svd-distill chat out --side-by-side
    """
    from moe_svd_distill.cli.screen import print_json, print_line
    from moe_svd_distill.errors import UsageError
    from moe_svd_distill.pipeline.chat import ChatSettings, ChatStudent

    if untouched and side_by_side:
        raise UsageError("--untouched and --side-by-side exclude one another", "Give one of them")
    speakers: list[Speaker] = ["student"] if untouched or side_by_side else []
    speakers += [] if untouched else ["adapted"]
    typed = sys.stdin.isatty()
    settings = ChatSettings(
        int(given["tokens"]), given["temperature"], int(given["seed"]), device, template=not raw, remember=typed
    )
    chat = ChatStudent(folder, student, settings)
    if typed and not as_json:
        print_line("Ctrl-D ends." if chat.templated else "No chat template: the text is gone on with. Ctrl-D ends.")
    found = []
    for prompt in _prompts(typed):
        answers = {}
        for speaker in speakers:
            if as_json:
                answers[speaker] = chat.answer(prompt, speaker)
                continue
            if side_by_side:
                click.echo(f"{_NAMES[speaker]}: ", nl=False)
            chat.answer(prompt, speaker, lambda text: click.echo(text, nl=False))
            click.echo()
        found.append({"prompt": prompt, "answers": answers})
    if as_json:
        print_json(found)


def _prompts(typed: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if typed else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        except UnicodeDecodeError as error:
            from moe_svd_distill.errors import BadDataError

            raise BadDataError(f"standard input is not text ({error})", "Give UTF-8, one prompt a line") from error
        if line.strip():
            yield line
