"""Where the bundled teacher-student pairs lie: inside an installed package, or in the source tree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe_svd_distill.errors import MissingInputError, UsageError


@dataclass(frozen=True)
class LabPair:
    """One trained pair with its text.

    Attributes:
        name: For example ``sibling``.
        teacher: Folder.
        student: Folder.
        calibration: Text for the scale search and later stages.
        heldout: Text nothing is fitted on.
        description: How the two are related.
    """

    name: str
    teacher: Path
    student: Path
    calibration: Path
    heldout: Path
    description: str


def lab_folder() -> Path:
    """The lab's folder.

    Raises:
        MissingInputError: Neither the package nor the source tree holds it.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "_lab", package.parent.parent / "lab"):
        if (folder / "pairs.yaml").is_file():
            return folder
    raise MissingInputError("the bundled lab models are not installed", "Install the package again")


def lab_pair(name: str) -> LabPair:
    """A bundled pair.

    Raises:
        UsageError: There is no pair of that name.
    """
    folder = lab_folder()
    content: dict[str, Any] = yaml.safe_load((folder / "pairs.yaml").read_text(encoding="utf-8"))
    pairs = content["pairs"]
    if name not in pairs:
        raise UsageError(f"there is no lab pair {name!r}", f"Choose one of {', '.join(pairs)}")
    entry = pairs[name]
    return LabPair(
        name=name,
        teacher=folder / entry["teacher"],
        student=folder / entry["student"],
        calibration=folder / content["text"]["calibration"],
        heldout=folder / content["text"]["heldout"],
        description=entry["description"],
    )
