"""A recipe as commented YAML, and its JSON schema."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml

from moe_svd_distill.recipe.allowed import allowed
from moe_svd_distill.recipe.model import Recipe
from moe_svd_distill.recipe.presets import PRESETS
from moe_svd_distill.recipe.section import Section

_WIDTH = 100


def recipe_yaml(recipe: Recipe, without: Collection[str] = ()) -> str:
    """Every key with what it means and what it takes.

    Args:
        recipe: The values.
        without: Keys that stand there as comments, so that they count as not given.
    """
    return "\n".join(_lines(recipe, recipe.model_dump(mode="json"), without)) + "\n"


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors and other programs."""
    return Recipe.model_json_schema()


def _lines(section: Section, values: Mapping[str, Any], without: Collection[str] = ()) -> Iterator[str]:
    for key, field in type(section).model_fields.items():
        inner, taken = getattr(section, key), allowed(field)
        own = isinstance(inner, Section)
        comment = f"{field.description}{f' [{taken}]' if taken and not own else ''}"
        yield from textwrap.wrap(comment, _WIDTH, initial_indent="# ", subsequent_indent="#   ")
        if own:
            yield f"{key}:"
            yield from (f"  {line}" for line in _lines(inner, values[key]))
        else:
            written = yaml.safe_dump({key: values[key]}, sort_keys=False, allow_unicode=True).rstrip().split("\n")
            yield from (f"# {line}" if key in without else line for line in written)


def supplied_values(recipe: Recipe) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """What the recipe has of its preset, and what was given otherwise in place of it."""
    taken: dict[str, object] = {}
    otherwise: dict[str, object] = {}
    for key, value in (PRESETS[recipe.preset] if recipe.preset else {}).items():
        found = getattr(recipe, key)
        (taken if found == value else otherwise)[key] = found
    return taken, otherwise
