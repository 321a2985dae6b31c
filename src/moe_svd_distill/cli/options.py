"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from moe_svd_distill.recipe import Recipe

Function = TypeVar("Function", bound=Callable[..., Any])


class Word(click.Choice[str]):
    """One of several words."""

    def get_invalid_choice_message(self, value: object, ctx: click.Context | None) -> str:
        return f"expected {self._either()}, found {value!r}"

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return f"Expected {self._either()}"

    def _either(self) -> str:
        return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"


class Number(click.IntRange):
    """A whole number from the least that makes sense on."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"expected a whole number (at least {self.min}), found {value}", param, ctx)


@dataclass(frozen=True)
class Shown:
    """How a command tells what it does.

    Attributes:
        as_json: One JSON document on standard output, and nothing else.
        quiet: Nothing while it runs.
        verbose: Every unit of work while it runs, and all tables at the end.
        log_file: Takes every line as well, with the time.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    log_file: Path | None = None


def shown_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is shown while a command runs and at its end, as one parameter ``shown``."""

    @wraps(function)
    def command(*given: Any, as_json: bool, quiet: bool, verbose: bool, log_file: Path | None, **options: Any) -> Any:
        return function(*given, shown=Shown(as_json, quiet, verbose, log_file), **options)

    decorators = [
        click.option("--quiet", "-q", is_flag=True, help="Show no progress and no notes."),
        click.option("--verbose", "-v", is_flag=True, help="Show every unit of work, and all tables."),
        click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Also write progress here."),
        json_option,
    ]
    return _decorated(command, decorators)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
force_option = click.option(
    "--force", is_flag=True, help="Replace a finished adapter in the output that another recipe has made."
)

# Option, its key, and what it is: what the key takes and its default are added from the recipe.
_SETTINGS = (
    ("--teacher", "teacher", "Folder, GGUF file or hub id of the teacher."),
    ("--student", "student", "Folder, GGUF file or hub id of the student."),
    ("--base-model", "base_model", "What the adapter names as its base model; default: the student."),
    ("--output", "output", "Folder for the adapter."),
    ("--preset", "preset", "Values for tokens and method; counts more than the recipe file."),
    ("--method", "method", "Stages to run."),
    ("--start", "start", "What refined begins with: auto, zero, stages, or an adapter's folder."),
    ("--calibration", "calibration", "Text to learn from: file, folder or datasets:NAME; repeatable."),
    ("--tokens", "tokens", "Tokens the adapter is fitted on; text for the scale search comes on top."),
    ("--scale-search-tokens", "scale_search_tokens", "Tokens the scale is searched on."),
    ("--rank", "rank", "Rank of the layers' matrices."),
    ("--head-rank", "head_rank", "Rank of the head."),
    ("--head-format", "head_format", "How a fitted head is carried."),
    ("--vocabulary", "vocabulary", "shared compares different tokenizers on what both have."),
    ("--cache", "cache", "Folder for hidden states, shared between runs; default: in the output."),
    ("--energy", "energy", "Choose ranks that keep this share of each change's energy."),
    ("--projection", "projection", "How a teacher's tensor is brought to the student's shape."),
    ("--depth-map", "depth_map", "Which teacher layer belongs to each student layer."),
    ("--report-to", "report_to", "Trackers: tensorboard, wandb, or both with a comma between them."),
    ("--workers", "workers", "Worker processes; default: one per device, or per core."),
    ("--device", "devices", "auto, cpu, or cuda:0,cuda:1."),
    ("--seed", "seed", "Seed of every random choice."),
)


class _Setting(click.Option):
    """An option of the recipe. What it takes is looked up only when help is asked for."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from moe_svd_distill.recipe import Recipe
        from moe_svd_distill.recipe.allowed import choices

        words = choices(Recipe.model_fields[str(self.name)])
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]

    def get_help_record(self, context: click.Context) -> tuple[str, str] | None:
        from moe_svd_distill.recipe import Recipe
        from moe_svd_distill.recipe.allowed import allowed

        field = Recipe.model_fields[str(self.name)]
        default = field.get_default(call_default_factory=True)
        words = [] if self.name in ("devices", "calibration", "report_to") else [allowed(field)]
        words += [f"default: {default}"] if default is not None and isinstance(default, str | int | Path) else []
        suffix = "; ".join(filter(None, words))
        return f"{'/'.join(self.opts)} VALUE", f"{self.help}{f'  [{suffix}]' if suffix else ''}"


def recipe_options(function: Function) -> Function:
    """The recipe as a file and the settings that override it."""
    decorators = [click.argument("recipe", required=False, type=click.Path(path_type=Path))]
    decorators += [
        click.option(flag, key, cls=_Setting, help=words, multiple=key == "calibration")
        for flag, key, words in _SETTINGS
    ]
    decorators.append(
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Any key of the recipe, such as --set training.epochs=2; repeatable. `schema` lists them.",
        )
    )
    return _decorated(function, [*decorators, force_option])


def read_recipe(recipe: Path | None, given: dict[str, Any], on_note: Callable[[str], object]) -> Recipe:
    """The validated recipe from a file and the options that were given."""
    from moe_svd_distill.recipe import load_recipe, read_value, set_values

    overrides = set_values(given.pop("assignments"))
    for key, text in given.items():
        if text not in (None, ()):
            overrides[key] = list(text) if isinstance(text, tuple) else read_value([key], text)
    return load_recipe(recipe, overrides, on_note=on_note)


def _decorated(function: Any, decorators: list[Any]) -> Any:
    for decorator in reversed(decorators):
        function = decorator(function)
    return function
