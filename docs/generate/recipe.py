"""The recipe's keys, from the model that validates them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from docs.generate.words import code, escaped, table
from moe_svd_distill.recipe import PRESETS, Recipe

_KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_NOTHING = "nothing"


def recipe_reference() -> str:
    """Every key under a heading of its own: kind, choices, default and meaning; sections after the plain keys."""
    schema = Recipe.model_json_schema()
    sections = {name: _section(field, schema) for name, field in schema["properties"].items()}
    plain = [line for name, section in sections.items() if section is None for line in _key(name, schema, schema)]
    nested = [
        line
        for name, section in sections.items()
        if section is not None
        for line in (
            f"## `{name}`",
            f"{escaped(section['description'])} In the file these keys stand indented under `{name}:`.",
            *(line for key in section["properties"] for line in _key(key, section, schema, name)),
        )
    ]
    return "\n\n".join(["## Keys", *plain, *nested])


def presets() -> str:
    """What each preset gives to keys that are not given otherwise."""
    keys = list(dict.fromkeys(key for values in PRESETS.values() for key in values))
    defaults = Recipe.model_fields
    rows = [
        (code(name), *(code(values.get(key, defaults[key].default)) for key in keys))
        for name, values in PRESETS.items()
    ]
    return table(("preset", *(f"[{key}](recipe.md#{key})" for key in keys)), rows)


def _key(name: str, model: Mapping[str, Any], schema: Mapping[str, Any], section: str = "") -> Iterator[str]:
    field = model["properties"][name]
    full = f"{section}.{name}" if section else name
    yield f"### `{full}` {{ #{full.replace('.', '-')} }}"
    default = "no default" if name in model.get("required", ()) else f"default {_default(field)}"
    yield f"{_kind(field, schema)} · {default}"
    yield escaped(field.get("description", ""))


def _section(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else None


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    return _NOTHING if value in (None, [], {}) else code(value)


def _kind(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in field:
        kinds = dict.fromkeys(_kind(each, schema) for each in field["anyOf"])
        return " or ".join(kind for kind in kinds if kind != _NOTHING)
    if "enum" in field:
        return " or ".join(map(code, field["enum"]))
    if "const" in field:
        return code(field["const"])
    if "$ref" in field:
        return f"mapping of {', '.join(map(code, _section(field, schema)['properties']))}"  # type: ignore[index]
    if field.get("type") == "null":
        return _NOTHING
    if field.get("type") == "array":
        return f"list of {_kind(field['items'], schema)}" if "items" in field else "list"
    if field.get("type") == "object":
        return f"mapping of names to {_kind(field['additionalProperties'], schema)}"
    if field.get("format") == "path":
        return "path"
    bounds = [f"{words} {field[bound]:g}" for bound, words in _BOUNDS.items() if bound in field]
    kind = _KINDS[field["type"]]
    return f"{kind} ({', '.join(bounds)})" if bounds else kind
