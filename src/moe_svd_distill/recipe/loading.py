"""Recipes from files, environment, command line and presets, and as YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moe_svd_distill.errors import BadDataError, MissingInputError, UsageError
from moe_svd_distill.recipe.model import ExpertSettings, Recipe, TrainingRecipe
from moe_svd_distill.recipe.section import Section
from moe_svd_distill.recipe.text_source import TextSource

ENVIRONMENT_PREFIX = "MOE_SVD_DISTILL_"
# By how much time a run may take. Whatever is given elsewhere wins over them.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"tokens": 16_384},
    "balanced": {"method": "refined", "tokens": 131_072},
    "best": {"method": "refined", "tokens": 393_216},
}
_SECTIONS: dict[str, type[Section]] = {"experts": ExpertSettings, "training": TrainingRecipe}


def load_recipe(
    file: Path | None,
    overrides: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> Recipe:
    """Join recipe file, environment and command line into a validated recipe.

    Args:
        file: A YAML file, or None.
        overrides: Command-line values; None means not given.
        environment: Defaults to the process environment.

    Raises:
        MissingInputError: The file does not exist.
        BadDataError: The file is not YAML or not a mapping.
        UsageError: An unknown key (named with its nearest known name) or a value out of range.
    """
    values = _read_yaml(file) if file is not None else {}
    values = _over(values, _from_environment(os.environ if environment is None else environment))
    values = _over(values, {key: value for key, value in overrides.items() if value is not None})
    return parse_recipe(values, source=str(file) if file else "the command line")


def parse_recipe(values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """Validate a mapping; keys that it lacks come from its preset, if it names one.

    Raises:
        UsageError: As ``load_recipe``.
    """
    try:
        return Recipe.model_validate(_with_preset(values))
    except ValidationError as error:
        raise _explain(error, source) from None


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Both together; `upper` wins, in the sections key by key."""
    sections = {key: value for key, value in upper.items() if key in _SECTIONS}
    return _merged(lower, sections) | {key: value for key, value in upper.items() if key not in sections}


def _explain(error: ValidationError, source: str) -> UsageError:
    # A source of text that is no path is a mapping, whatever else it might have been.
    found = [each for each in error.errors() if "str" not in each["loc"] or not isinstance(each["input"], Mapping)]
    first = (found or error.errors())[0]
    place = ".".join(str(part) for part in first["loc"] if not _is_union_tag(part))
    same_place = [other for other in found or error.errors() if other["loc"][:1] == first["loc"][:1]]
    if first["type"] == "extra_forbidden":
        section = TextSource if "TextSource" in first["loc"] else _SECTIONS.get(str(first["loc"][0]), Recipe)
        near = get_close_matches(str(first["loc"][-1]), section.model_fields, n=1, cutoff=0.4)
        action = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(section.model_fields)}"
        return UsageError(f"{source}: unknown key {place!r}", action.rstrip("?"))
    if first["type"] == "missing":
        return UsageError(f"{source}: {place} is not given", f"Give --{place} or the recipe key {place!r}")
    message = " or ".join(dict.fromkeys(other["msg"].removeprefix("Value error, ") for other in same_place))
    given = "" if isinstance(first["input"], Mapping) else f", found {first['input']!r}"
    return UsageError(f"{source}: {place or 'recipe'}: {message}{given}", "Correct that value")


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "constrained-int", "TextSource"))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError(f"recipe {file} does not exist", "Write one with: moe-svd-distill init") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadDataError(f"recipe {file} is not readable as YAML: {error}", "Correct the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadDataError(f"recipe {file} holds a {type(content).__name__}, expected keys and values", "Correct it")
    return content


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            values[key] = (
                text
                if key in ("teacher", "student", "base_model", "output", "devices", "start")
                else yaml.safe_load(text)
            )
    return values


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as commented YAML, every key present."""
    values = recipe.model_dump(mode="json")
    lines = []
    for key, field in Recipe.model_fields.items():
        lines.append(f"# {field.description}")
        lines.append(yaml.safe_dump({key: values[key]}, sort_keys=False, allow_unicode=True).rstrip())
    return "\n".join(lines) + "\n"


def _with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe with those of its preset, if it names one, for keys that are not given.

    A name that is no preset's is left for the recipe to refuse.
    """
    name = values.get("preset")
    supplied = PRESETS.get(name, {}) if isinstance(name, str) else {}
    return _merged(supplied, values)


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Both together, key by key inside sections too; `upper` wins."""
    result = dict(lower)
    for key, given in upper.items():
        below, above = _keys(lower.get(key)), _keys(given)
        result[key] = given if below is None or above is None else {**below, **above}
    return result


def supplied_values(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the recipe has of its preset, and what was given otherwise in place of it."""
    taken: dict[str, Any] = {}
    otherwise: dict[str, Any] = {}
    for key, value in (PRESETS[recipe.preset] if recipe.preset else {}).items():
        found = getattr(recipe, key)
        (taken if found == value else otherwise)[key] = found
    return taken, otherwise


def _keys(value: Any) -> Mapping[str, Any] | None:
    """What a section gives, or None for anything else."""
    if isinstance(value, Section):
        return {key: getattr(value, key) for key in value.model_fields_set}
    return value if isinstance(value, Mapping) else None
