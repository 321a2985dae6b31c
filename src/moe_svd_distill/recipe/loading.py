"""Recipes from file, environment and command line, joined by what counts more."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moe_svd_distill.errors import BadDataError, MissingInputError, UsageError, reason_of
from moe_svd_distill.recipe.allowed import field_at, takes_text_alone
from moe_svd_distill.recipe.model import Recipe
from moe_svd_distill.recipe.presets import with_preset
from moe_svd_distill.recipe.refusals import refusal
from moe_svd_distill.recipe.section import Section
from moe_svd_distill.recipe.sections import SECTIONS

ENVIRONMENT_PREFIX = "MOE_SVD_DISTILL_"
_ENVIRONMENT = "the environment"
Layer = tuple[str, Mapping[str, Any]]
"""Where values were given, and the values."""


def load_recipe(
    file: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    on_note: Callable[[str], object] = warnings.warn,
) -> Recipe:
    """Join recipe file, environment and command line into a validated recipe.

    What stands further up counts more: command line, environment, file. The uppermost preset counts where it stands:
    more than what is given below, less than what is given beside it or above.

    Args:
        file: A YAML file, or None.
        overrides: Command-line values.
        environment: Defaults to the process environment.
        on_note: Told which values a preset takes the place of.

    Raises:
        MissingInputError: The file does not exist.
        BadDataError: The file is not YAML or not a mapping.
        UsageError: An unknown key (named with its nearest known name) or a value out of range.
    """
    source = "the command line" if file is None else str(file)
    layers: list[Layer] = [(source, {} if file is None else _read_yaml(Path(file)))]
    layers.append((_ENVIRONMENT, _from_environment(os.environ if environment is None else environment)))
    layers.append(("the command line", overrides or {}))
    return _validated(_joined(layers, on_note), lambda path: _origin(layers, path) or source)


def parse_recipe(values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """Validate a mapping; keys that it lacks come from its preset, if it names one.

    Raises:
        UsageError: As ``load_recipe``.
    """
    return _validated(values, lambda path: source)


def as_recipe(recipe: Recipe | Path | str) -> Recipe:
    """A recipe, or the one in a file with what the environment says.

    Raises:
        DistillError: As ``load_recipe``.
    """
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def set_values(assignments: Sequence[str]) -> dict[str, Any]:
    """Values of ``KEY=VALUE`` and ``SECTION.KEY=VALUE``, each value as YAML has it.

    Raises:
        UsageError: An assignment is not of this form.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip("."):
            raise UsageError(f"--set {assignment}: expected KEY=VALUE", "Write for example --set training.epochs=2")
        _put(values, key.strip().split(".", 1), text)
    return values


def read_value(path: Sequence[str], text: str) -> Any:
    """What is typed for a key: text where the key takes nothing else, or as YAML has it.

    Raises:
        UsageError: It is not YAML.
    """
    field = field_at(Recipe, path)
    if field is not None and takes_text_alone(field) and not text.startswith("["):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"{'.'.join(path)}: {text!r} cannot be read as a value", "Put it into quotes") from None


def _validated(values: Mapping[str, Any], source: Callable[[Sequence[Any]], str]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise refusal(error, source) from None


def _joined(layers: Sequence[Layer], on_note: Callable[[str], object]) -> dict[str, Any]:
    """All layers in one, the last one uppermost."""
    preset = max((place for place, (_, values) in enumerate(layers) if "preset" in values), default=None)
    joined: dict[str, Any] = {}
    for place, (where, values) in enumerate(layers):
        given = {**values, **({"preset": None} if preset is not None and place < preset else {})}
        complete = with_preset(given)
        lost = [key for key in complete if key not in values and joined.get(key, complete[key]) != complete[key]]
        if place == preset and lost:
            words = [f"{key} {complete[key]} (not {joined[key]}: {_origin(layers, [key])})" for key in lost]
            on_note(f"preset {values['preset']} of {where} counts more than what is given below it: {', '.join(words)}")
        joined = _over(joined, complete)
    return joined


def _origin(layers: Sequence[Layer], path: Sequence[Any]) -> str | None:
    """Where the value at a place in the recipe was given."""
    for where, values in reversed(layers):
        found: Any = values
        for depth, part in enumerate(path[:2]):
            if not isinstance(found, Mapping) or part not in found:
                break
            found = found[part]
            if depth + 1 == len(path[:2]) or not isinstance(found, Mapping):
                named = "__".join(str(part) for part in path[:2] if isinstance(part, str)).upper()
                return f"{ENVIRONMENT_PREFIX}{named}" if where == _ENVIRONMENT else where
    return None


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Both together; `upper` wins, in the sections key by key."""
    result = {**lower, **upper}
    for key in SECTIONS:
        below, above = _keys(lower.get(key)), _keys(upper.get(key))
        if below is not None and above is not None:
            result[key] = {**below, **above}
    return result


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError(f"recipe {file} does not exist", "Write one with: moe-svd-distill init") from None
    except OSError as error:
        raise BadDataError(f"recipe {file} cannot be read: {error.strerror}", "Give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or reason_of(error)
        line = f", line {mark.line + 1}" if mark else ""
        raise BadDataError(f"recipe {file} is not readable as YAML{line}: {problem}", "Correct the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadDataError(f"recipe {file} holds a {type(content).__name__}, expected keys and values", "Correct it")
    return content


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """``PREFIX_KEY`` and ``PREFIX_SECTION__KEY``."""
    values: dict[str, Any] = {}
    for variable, text in sorted(environment.items()):
        if variable.startswith(ENVIRONMENT_PREFIX):
            _put(values, variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__", 1), text)
    return values


def _put(values: dict[str, Any], path: Sequence[str], text: str) -> None:
    """Place one value, inside its section if there is one."""
    section = values
    for part in path[:-1]:
        inner = section.get(part)
        section[part] = section = dict(inner) if isinstance(inner, Mapping) else {}
    section[path[-1]] = read_value(path, text)


def _keys(value: Any) -> Mapping[str, Any] | None:
    """What a section gives, or None for anything else."""
    if isinstance(value, Section):
        return {key: getattr(value, key) for key in value.model_fields_set}
    return value if isinstance(value, Mapping) else None
