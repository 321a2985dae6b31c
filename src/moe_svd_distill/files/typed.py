"""Dataclasses as JSON and back: what is written is read into the class that wrote it.

A file may be older than the class or damaged, and reading it is no error: a value that is missing or of another type
has its field's default, or else is the nothing of its type: None where that is allowed, not a number, 0 or empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

T = TypeVar("T")
Convert: TypeAlias = Callable[[Any], Any]

DERIVED = "derived"
"""Class attribute of a dataclass: names of its properties that are written behind its fields."""
_NOTHING: Mapping[Any, Any] = {float: math.nan, int: 0, str: "", bool: False}


def at(path: str) -> Any:
    """A field that lies elsewhere in the JSON than under its name; keys are joined by dots."""
    return field(metadata={"path": path})


def as_json(record: Any) -> dict[str, object]:
    """A dataclass as plain values by name; what is not a number is None."""
    names = (*(each.name for each in fields(record)), *getattr(record, DERIVED, ()))
    return {name: _plain(getattr(record, name)) for name in names}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return as_json(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_as(kind: Callable[..., T], content: Any) -> T:
    """A dataclass from JSON; keys that it does not know are passed over."""
    found = {}
    for name, path, convert in _readers(kind):
        value = content
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        found[name] = convert(value)
    return kind(**found)


@cache
def _readers(kind: Any) -> tuple[tuple[str, tuple[str, ...], Convert], ...]:
    """Name, place in the JSON and conversion of every field."""
    hints = get_type_hints(kind)
    readers = []
    for each in fields(kind):
        path = str(each.metadata.get("path", each.name))
        readers.append((each.name, tuple(path.split(".")) if path else (), _of_field(each, hints[each.name])))
    return tuple(readers)


def _of_field(each: Field[Any], hint: Any) -> Convert:
    kinds, convert = _kinds(hint), _conversion(hint)
    if each.default_factory is not MISSING:
        make = each.default_factory
        return lambda value: convert(value) if isinstance(value, kinds) else make()
    if each.default is not MISSING:
        return lambda value: convert(value) if isinstance(value, kinds) else each.default
    return convert


def _conversion(hint: Any) -> Convert:
    """From what JSON holds to what a type hint says, or to the nothing of it."""
    origin, inside, kinds = get_origin(hint), get_args(hint), _kinds(hint)
    if origin in (Union, UnionType):
        known = [each for each in inside if each is not NoneType]
        convert = _conversion(known[0] if len(known) == 1 else Any)
        return lambda value: convert(value) if isinstance(value, kinds) and value != {} else None
    if is_dataclass(hint):
        return lambda value: read_as(hint, value)  # type: ignore[arg-type]
    if is_typeddict(hint):
        allowed = {key: _kinds(each) for key, each in get_type_hints(hint).items()}
        return lambda value: {key: one for key, one in _items(value) if isinstance(one, allowed.get(key, ()))}
    if origin is Literal or _is_enum(hint):
        words = {each: each for each in inside} or {each.value: each for each in hint}
        return lambda value: words.get(value) if isinstance(value, kinds) else None
    if origin in (tuple, list):
        of_each = _conversion(inside[0])
        make: Convert = origin
        return lambda value: make(of_each(one) for one in _listed(value))
    if origin in (dict, Mapping):
        of_value = _conversion(inside[1])
        return lambda value: {key: of_value(one) for key, one in _items(value)}
    return lambda value: value if isinstance(value, kinds) else _NOTHING.get(hint)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, StrEnum)


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else ()


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, Mapping) else ()


def _kinds(hint: Any) -> tuple[type, ...]:
    """What JSON may hold where a type hint stands."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return tuple(kind for each in inside if each is not NoneType for kind in _kinds(each))
    if origin is Literal or _is_enum(hint):
        return tuple({type(each) for each in inside} or {str})
    if is_dataclass(hint) or is_typeddict(hint) or origin in (dict, Mapping):
        return (Mapping,)
    if origin in (tuple, list):
        return (list, tuple)
    if hint in (Any, object):
        return (object,)
    return (float, int) if hint is float else (hint,)
