"""What validation found wrong, as one line in our own words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from moe_svd_distill.errors import UsageError, shown
from moe_svd_distill.recipe.allowed import allowed, field_at
from moe_svd_distill.recipe.model import Recipe
from moe_svd_distill.recipe.section import Section
from moe_svd_distill.recipe.sections import SECTIONS
from moe_svd_distill.recipe.text_source import TextSource


def refusal(error: ValidationError, source: Callable[[Sequence[Any]], str]) -> UsageError:
    """The first fault.

    Args:
        error: Of the recipe.
        source: Where the value at a place in the recipe was given.
    """
    # A source of text that is no path is a mapping, whatever else it might have been.
    errors = error.errors()
    found = [each for each in errors if "str" not in each["loc"] or not isinstance(each["input"], Mapping)] or errors
    first = found[0]
    path = [part for part in first["loc"] if not _is_union_tag(part)]
    place, where = ".".join(map(str, path)), source(path)
    if first["type"] == "extra_forbidden":
        section: type[Section] = TextSource if "TextSource" in first["loc"] else SECTIONS.get(str(path[0]), Recipe)
        near = get_close_matches(str(path[-1]), section.model_fields, n=1, cutoff=0.4)
        known = f"Known keys: {', '.join(section.model_fields)}"
        return UsageError(f"{where}: unknown key {place!r}", f"Did you mean {near[0]!r}?" if near else known)
    if first["type"] == "missing":
        if place in ("teacher", "student"):
            return UsageError(f"{where}: {place} is not given", f"Give --{place} or the recipe key {place!r}")
        return UsageError(f"{where}: {place} is not given", "Add it")
    own = next((str(each["ctx"]["error"]) for each in found if each["type"] == "value_error"), None)
    if not path:
        what, _, action = str(own).partition(": give ")
        return UsageError(f"{where}: {what}", f"Give {action}" if action else "Correct that")
    value = first["input"]
    if own is None or first["type"] != "value_error":
        own = f"expected {_expected(path)}"
    told = first["type"] == "value_error" and (isinstance(value, Mapping | list) or repr(value) in own)
    given = "" if told else f", found {shown(value)}"
    return UsageError(f"{where}: {place}: {own}{given}", "Correct that value")


def _expected(path: Sequence[Any]) -> str:
    field = field_at(Recipe, path)
    words = (allowed(field) if field else "") or "text"
    inside = field is field_at(Recipe, path[:-1])  # of a list or of a mapping, which has no key of that name
    return words.removeprefix("a list of ").removeprefix("a mapping of text to ") if inside else words


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "constrained-int", "TextSource"))
