"""Whether a run may write to its output folder, and what of an earlier adapter may stay beside the new one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.errors import BadDataError, CannotWriteError, shown
from moe_svd_distill.files.names import (
    CACHE_FOLDER,
    EVALUATION_FILE,
    LOCK_FILE,
    PARTS_FOLDER,
    RECORD_FILE,
    REPORT_FILE,
)
from moe_svd_distill.recipe import Recipe

_INPUTS = ("teacher", "student", "base_model", "calibration")
_NAMES = {"base_model": "base model", "calibration": "calibration text"}
_OF_THE_SEARCH = ("scale_search", "scale_search_tokens")  # asked for anew, a finished run searches again, no more
_UNIMPORTANT = ("output", "cache", "devices", "workers", "remote_cache_gb", "report_to")  # for what an adapter is


def judge_output(recipe: Recipe, *, force: bool = False) -> list[str]:
    """Whether the output is free for this recipe; notes on what is going to be replaced there.

    Args:
        recipe: What is asked for.
        force: Whether a finished adapter that another recipe has made may be replaced.

    Raises:
        CannotWriteError: The folder is a file, holds files of others, or holds such an adapter.
    """
    folder = recipe.output
    if folder.exists() and not folder.is_dir():
        raise CannotWriteError(f"output {folder} is a file, expected a folder", "Choose another --output")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {RECORD_FILE, PARTS_FOLDER, CACHE_FOLDER, LOCK_FILE}:
        raise CannotWriteError(
            f"output {folder} is not empty and holds no earlier run (found {sorted(names)[0]})",
            "Choose another --output",
        )
    changed = _changed(recipe) if RECORD_FILE in names else {}
    other = {key: values for key, values in changed.items() if key not in _OF_THE_SEARCH}
    if other and not force:
        key, (before, now) = next(iter(other.items()))
        raise CannotWriteError(
            f"output {folder} holds a finished adapter of another {_NAMES.get(key, key)} "
            f"(found {_short(before)}, expected {_short(now)})",
            "Choose another --output, or add --force to replace it",
        )
    if not changed:
        return []
    words = [f"{key} {_short(before)} → {_short(now)}" for key, (before, now) in changed.items()]
    return [f"replaces the finished adapter in {folder}, which another recipe has made: {', '.join(words)}"]


def finished_digest(recipe: Recipe) -> str | None:
    """sha256 of the adapter that this recipe has made in its output before; None where there is none."""
    if not (recipe.output / RECORD_FILE).is_file() or _changed(recipe):
        return None
    with suppress(BadDataError):
        digest = read_json(recipe.output / RECORD_FILE).get("adapter_sha256")
        return digest if isinstance(digest, str) else None
    return None


def essentials(recipe: Recipe) -> dict[str, Any]:
    """What is asked for, without what changes nothing about an adapter."""
    return {key: value for key, value in recipe.model_dump(mode="json").items() if key not in _UNIMPORTANT}


def earlier_figures(folder: Path, digest: str) -> tuple[Mapping[str, Any] | None, list[str]]:
    """The evaluation in a folder if it is of these bytes, or else the names of what is out of date.

    Args:
        folder: The output.
        digest: sha256 of the new adapter.
    """
    file = folder / EVALUATION_FILE
    try:
        figures = read_json(file) if file.is_file() else {}
    except BadDataError:
        figures = {}
    if figures.get("adapter_sha256") == digest:
        return figures, []
    return None, [EVALUATION_FILE, REPORT_FILE]


def _changed(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Key to what the adapter in the output was made with and what is asked for now, the inputs first."""
    try:
        content = read_json(recipe.output / RECORD_FILE)
    except BadDataError:
        return {}
    before, now = content.get("recipe") or {}, recipe.model_dump(mode="json")
    if not isinstance(before, dict):
        return {}
    keys = [*_INPUTS, *(key for key in now if key not in _INPUTS and key not in _UNIMPORTANT)]
    found = {key: (before[key], now[key]) for key in keys if key in before}
    return {key: pair for key, pair in found.items() if _located(pair[0]) != _located(pair[1])}


def _located(value: Any) -> Any:
    """A path whatever it is written like."""
    if isinstance(value, list):
        return [_located(each) for each in value]
    if isinstance(value, dict):
        return {key: _located(each) for key, each in value.items()}
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value


def _short(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)
