"""Presets: values by how much time a run may take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

Preset: TypeAlias = Literal["fast", "balanced", "best"]
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"tokens": 16_384},
    "balanced": {"method": "refined", "tokens": 131_072},
    "best": {"method": "refined", "tokens": 393_216},
}
PRESET_KEYS = frozenset(key for supplied in PRESETS.values() for key in supplied)


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values and, for keys that are not among them, those of the preset they name.

    A name that is no preset's is left for the recipe to refuse.
    """
    name = values.get("preset")
    supplied = PRESETS.get(name, {}) if isinstance(name, str) else {}
    return {**supplied, **values}
