"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")


class RankType(click.ParamType[int | str]):
    """A positive integer, 'full', or another word that is allowed."""

    name = "rank"

    def __init__(self, *words: str) -> None:
        self.words = ("full", *words)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int | str:
        if value in self.words or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor {' nor '.join(map(repr, self.words))}", parameter, context)


def recipe_options(function: Function) -> Function:
    """The recipe as a file and the settings that override it."""
    decorators = [
        click.argument("recipe", required=False, type=click.Path(path_type=Path, dir_okay=False)),
        click.option("--teacher", help="Folder, GGUF file or hub id of the teacher."),
        click.option("--student", help="Folder, GGUF file or hub id of the student."),
        click.option("--base-model", help="What the adapter names as its base model; default: the student."),
        click.option("--output", type=click.Path(path_type=Path), help="Folder for the adapter."),
        click.option("--preset", help="fast, balanced or best: values for keys that are not given otherwise."),
        click.option("--method", help="auto, weights, calibrated, weights+calibrated, or refined: LoRA training."),
        click.option("--start", help="What refined begins with: auto, zero, names of stages, or an adapter's folder."),
        click.option(
            "--calibration",
            multiple=True,
            help="Text the adapter is fitted and scaled on: file, folder or datasets:NAME; repeatable.",
        ),
        click.option("--tokens", type=int, help="Tokens the adapter is fitted on; scale search text comes on top."),
        click.option(
            "--scale-search-tokens", type=int, help="Tokens the scale is searched on; with more, a fit is not repeated."
        ),
        click.option("--rank", type=RankType(), help="Rank of the body, or 'full'."),
        click.option("--head-rank", type=RankType("auto"), help="Rank of the head, 'full' or 'auto'."),
        click.option("--head-format", help="How a fitted head is carried: auto, pair or whole."),
        click.option("--vocabulary", help="equal, or shared to compare different tokenizers on what both have."),
        click.option("--cache", type=click.Path(path_type=Path), help="Folder for hidden states, shared between runs."),
        click.option("--energy", type=float, help="Choose ranks that keep this share of each delta's energy."),
        click.option("--projection", help="svd, fourier, slice or procrustes."),
        click.option("--depth-map", help="linear, endpoints or tanh."),
        click.option("--workers", type=int, help="Worker processes."),
        click.option("--device", "devices", help="auto, cpu, or cuda:0,cuda:1."),
        click.option("--seed", type=int, help="Seed of every random choice."),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def read_recipe(recipe: Path | None, given: dict[str, Any]) -> Any:
    """The validated recipe from a file and the options that were given."""
    from moe_svd_distill.recipe import load_recipe

    overrides = {key: value for key, value in given.items() if value is not None and value != ()}
    if "calibration" in overrides:
        overrides["calibration"] = list(overrides["calibration"])
    return load_recipe(recipe, overrides)
