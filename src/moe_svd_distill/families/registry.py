"""Finds the family of a model. Every module of this package that defines ``FAMILY`` is one entry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

import moe_svd_distill.families as package
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families.family import Family


@cache
def families() -> dict[str, Family]:
    """All known families by ``model_type``."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(package.__path__):
        family = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "FAMILY", None)
        if isinstance(family, Family):
            found[family.model_type] = family
    return found


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family that config.json names.

    Args:
        config: The parsed config.json.
        source: The model as the user named it, for the error.

    Raises:
        BadDataError: The architecture is unknown.
    """
    model_type = config.get("model_type")
    known = families()
    if model_type in known:
        return known[str(model_type)]
    near = get_close_matches(str(model_type), known, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise BadDataError(
        f"{source}: unknown architecture: config.json says model_type {model_type!r}, known are "
        f"{', '.join(sorted(known))}{hint}",
        "Use a model of a known family, or add one file to families/",
    )
