"""JSON as dataclasses: what is missing, or of another type than its field, is None or empty and no error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def at(path: str) -> Any:
    """A field that lies elsewhere in the JSON than under its name; keys are joined by dots."""
    return field(metadata={"path": path})


def read_as(kind: Callable[..., T], content: Any) -> T:
    """A dataclass from JSON: what is missing, null or of another type has the field's default, or is None or empty."""
    found = {}
    for name, path, convert in _readers(kind):
        value = content
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        found[name] = convert(value)
    return kind(**found)


@cache
def _readers(kind: Any) -> tuple[tuple[str, tuple[str, ...], Callable[[Any], Any]], ...]:
    """Name, place in the JSON and conversion of every field."""
    hints = get_type_hints(kind)
    readers = []
    for each in fields(kind):
        path = str(each.metadata.get("path", each.name))
        default = None if each.default is MISSING else each.default
        readers.append((each.name, tuple(path.split(".")) if path else (), _conversion(hints[each.name], default)))
    return tuple(readers)


def _conversion(hint: Any, default: Any = None) -> Callable[[Any], Any]:
    kind, inside = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return lambda value: read_as(hint, value)  # type: ignore[arg-type]
    if kind is tuple:
        each = _conversion(inside[0])
        return lambda value: tuple(map(each, value)) if isinstance(value, list | tuple) else ()
    if kind is Mapping:
        of_key = _conversion(inside[1])
        return lambda value: {k: of_key(v) for k, v in value.items()} if isinstance(value, Mapping) else {}
    known = [each for each in inside if each is not NoneType] if kind in (Union, UnionType) else [hint]
    if is_dataclass(known[0]):
        return lambda value: read_as(known[0], value) if isinstance(value, Mapping) and value else None
    if hint is Any:
        return lambda value: value
    kinds = tuple(get_origin(each) or each for each in known)
    return lambda value: value if isinstance(value, (*kinds, int) if float in kinds else kinds) else default
