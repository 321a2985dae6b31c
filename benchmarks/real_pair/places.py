"""Where everything lies: a cache folder outside the repository."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "MOE_SVD_DISTILL_REAL_PAIR"
DEFAULT = Path("~/.cache/moe-svd-distill/real_pair")
_PINS = Path(__file__).parent / "pins.toml"


@dataclass(frozen=True)
class Places:
    """The folders of one cache.

    Attributes:
        root: Of the cache.
        student_name: Folder of the student below `models`.
    """

    root: Path
    student_name: str = "coder-0.5b"
    teacher_name: str = "coder-1.5b"

    @classmethod
    def at(cls, folder: Path | None, student: str | None = None) -> Places:
        """The cache that was asked for, else that of the environment, else the usual one.

        Raises:
            SystemExit: It lies in the repository.
        """
        named = folder or Path(os.environ.get(VARIABLE) or DEFAULT)
        root = (named.expanduser() / "work").resolve()
        if root.is_relative_to(Path(__file__).resolve().parents[2]):
            raise SystemExit(f"the cache {root} lies in the repository; give --cache or {VARIABLE} outside of it")
        return cls(root, student or pins()["models"]["student"]["folder"], pins()["models"]["teacher"]["folder"])

    @property
    def student(self) -> Path:
        """The student's folder."""
        return self.root / "models" / self.student_name

    @property
    def teacher(self) -> Path:
        """The teacher's folder."""
        return self.root / "models" / self.teacher_name

    def text(self, part: str) -> Path:
        """JSON lines of `train`, `calibration`, `heldout` or `prose`."""
        return self.root / "text" / f"{part}.jsonl"

    @property
    def rows(self) -> Path:
        """Folders of rows."""
        return self.root / "rows"


def pins() -> dict[str, Any]:
    """What everything is made from."""
    return tomllib.loads(_PINS.read_text(encoding="utf-8"))
