"""A published adapter, and the folder it lies in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import CannotWriteError, MissingInputError
from moe_svd_distill.files.names import CACHE_FOLDER, LOCK_FILE, PARTS_FOLDER, RECORD_FILE


@dataclass(frozen=True)
class Adapter:
    """A published adapter.

    Attributes:
        folder: Where it lies.
        record: The content of run.json.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Digest of adapter_model.safetensors."""
        return str(self.record["adapter_sha256"])

    @property
    def transferred(self) -> bool | None:
        """Whether anything was transferred: None where no calibration text was given, so nobody knows."""
        return self.record["transferred"]


def load_adapter(folder: Path) -> Adapter:
    """A published adapter.

    Raises:
        MissingInputError: The folder holds none.
    """
    manifest = folder / RECORD_FILE
    if not manifest.is_file():
        raise MissingInputError(
            f"{folder} holds no finished adapter (no {RECORD_FILE})", "Run moe-svd-distill distill with this --output"
        )
    return Adapter(folder, json.loads(manifest.read_text(encoding="utf-8")))


def refuse_foreign_folder(folder: Path) -> None:
    """Refuse to write into a folder that holds something else than an earlier run."""
    if folder.exists() and not folder.is_dir():
        raise CannotWriteError(f"output {folder} is a file, expected a folder", "Choose another --output")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    if names and not names & {RECORD_FILE, PARTS_FOLDER, CACHE_FOLDER, LOCK_FILE}:
        raise CannotWriteError(
            f"output {folder} is not empty and holds no earlier run (found {sorted(names)[0]})",
            "Choose another --output",
        )
