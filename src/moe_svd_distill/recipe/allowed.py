"""What a key of the recipe takes, in words: for the comments of a recipe, for ``--help``, and for refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_BOUNDS = (("ge", "at least {}"), ("gt", "above {}"), ("le", "at most {}"), ("lt", "below {}"))


def allowed(field: FieldInfo) -> str:
    """The values a field takes, such as ``auto or a whole number (at least 1)``; empty for any text or path."""
    found = _words(field.annotation, field.metadata)
    return "" if found in ("text", "a path") else found


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words a field takes; empty where it takes none by name."""
    kinds = [kind for kind in _alternatives(field.annotation) if _is_choice(kind)]
    return tuple(str(word) for kind in kinds for word in get_args(kind))


def takes_text_alone(field: FieldInfo) -> bool:
    """Whether what is typed for it is text as it stands, whatever it looks like."""
    return all(kind in (str, Path, list[str]) for kind in _alternatives(field.annotation))


def field_at(section: type[BaseModel], path: Sequence[int | str]) -> FieldInfo | None:
    """The field at a place in a recipe, or the nearest one above it; None where there is no key of that name."""
    found = None
    for part in path:
        if isinstance(part, int) or part not in section.model_fields:
            continue
        found = section.model_fields[part]
        section = next(filter(_is_section, _inner(found.annotation)), section)
    return found


def _alternatives(annotation: Any) -> list[Any]:
    """What a field may hold beside nothing."""
    if get_origin(annotation) in (Union, UnionType):
        return [each for each in get_args(annotation) if each is not NoneType]
    return [annotation]


def _inner(annotation: Any) -> list[Any]:
    """The same, and of a list what its entries may be."""
    kinds = _alternatives(annotation)
    return kinds + [each for kind in kinds if get_origin(kind) is list for each in _alternatives(get_args(kind)[0])]


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    kinds = _alternatives(annotation)
    if len(kinds) > 1:
        return " or ".join(dict.fromkeys(_words(kind) for kind in sorted(kinds, key=_is_choice, reverse=True)))
    (kind,) = kinds
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(inner[0], inner[1:])
    if origin is Literal:
        return ", ".join(map(str, inner[:-1])) + (" or " if len(inner) > 1 else "") + str(inner[-1])
    if origin is list:
        return f"a list of {_words(inner[0])}"
    if origin is dict:
        return f"a mapping of text to {_words(inner[1])}"
    if _is_section(kind):
        return f"{{{', '.join(kind.model_fields)}}}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    bounds = [text.format(f"{getattr(each, name):g}") for each in _flat(metadata) for name, text in _BOUNDS
              if getattr(each, name, None) is not None]  # fmt: skip
    return names.get(kind, "a value") + (f" ({', '.join(bounds)})" if bounds else "")


def _flat(metadata: Sequence[Any]) -> list[Any]:
    """Constraints, those inside of a ``Field`` as well."""
    return [each for outer in metadata for each in (outer.metadata if isinstance(outer, FieldInfo) else (outer,))]


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
