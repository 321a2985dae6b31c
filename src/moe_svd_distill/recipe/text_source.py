"""Where calibration text comes from, and how much of it from where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from moe_svd_distill.recipe.section import Section

_ROUNDED = 0.015  # of shares such as 0.33


class TextSource(Section):
    """Where calibration text comes from."""

    path: str = Field(description="File, folder or datasets:NAME.")
    share: float | None = Field(
        None, gt=0, le=1, description="Share of the tokens; default: what the others leave, together."
    )
    field: str | None = Field(None, description="Field of its records that holds the text; default: text_field.")

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value


def text_sources(given: Sequence[Any]) -> tuple[TextSource, ...]:
    """Paths, and mappings with a path, as sources.

    Raises:
        ValueError: An entry is neither, or the shares leave nothing for one, or are more than there is.
    """
    sources = tuple(
        TextSource.model_validate(each if isinstance(each, TextSource | Mapping) else {"path": each}) for each in given
    )
    shares = [source.share for source in sources if source.share is not None]
    if not shares:
        return sources
    rest = 1 - sum(shares)
    if len(shares) < len(sources) and rest < _ROUNDED:
        raise ValueError(f"the shares sum to {sum(shares):g} and leave nothing for the sources without one")
    if len(shares) == len(sources) and abs(rest) > _ROUNDED:
        raise ValueError(f"the shares sum to {sum(shares):g}, expected 1")
    return sources
