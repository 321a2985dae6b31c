"""Named sets of values, by how much time a run may take. Whatever is given elsewhere wins over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_svd_distill.recipe.sections import Section

if TYPE_CHECKING:
    from moe_svd_distill.recipe.model import Recipe

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"tokens": 16_384},
    "balanced": {"method": "refined", "tokens": 131_072},
    "best": {"method": "refined", "tokens": 393_216},
}


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe with those of its preset, if it names one, for keys that are not given.

    A name that is no preset's is left for the recipe to refuse.
    """
    name = values.get("preset")
    supplied = PRESETS.get(name, {}) if isinstance(name, str) else {}
    return merged(supplied, values)


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
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
