"""A row of the table: a folder with `row.json`, whose sections are made once for the same inputs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "transformers", "peft", "trl", "moe-svd-distill")


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        folder: Where it lies.
    """

    folder: Path

    @property
    def name(self) -> str:
        """What it is called."""
        return self.folder.name

    @property
    def adapter(self) -> Path:
        """Folder of its adapter."""
        return self.folder / "adapter"

    def read(self) -> dict[str, Any]:
        """Its sections; empty where there is nothing yet."""
        file = self.folder / "row.json"
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return content

    def section(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Make a section, unless it is there and was made from the same inputs.

        Args:
            name: Of the section.
            inputs: Everything it depends on, as plain values.
            make: Makes it.
        """
        digest, there = digest_of(inputs), self.read().get(name)
        if there and there["inputs_sha256"] == digest:
            print(f"{self.name}: {name} is there", flush=True)
            return dict(there)
        self.folder.mkdir(parents=True, exist_ok=True)
        made = {"inputs": dict(inputs), "inputs_sha256": digest, "libraries": libraries(), **make()}
        write_json(self.folder / "row.json", {**self.read(), name: made})
        return made


def existing_row(rows: Path, name: str) -> Row:
    """A row by its name.

    Raises:
        SystemExit: There is none.
    """
    row = Row(rows / name)
    if not row.read():
        raise SystemExit(f"there is no row {name!r} in {rows} (found {', '.join(names(rows)) or 'none'})")
    return row


def names(rows: Path) -> list[str]:
    """Names of all rows."""
    return sorted(file.parent.name for file in rows.glob("*/row.json"))


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def digest_of(value: Any) -> str:
    """Sha256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Sha256 of a file.

    Raises:
        SystemExit: It is not there.
    """
    if not path.is_file():
        raise SystemExit(f"{path} is not there; run the steps fetch and text first")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_digest(folder: Path) -> str:
    """Of a model's settings, tokenizer, and the sizes and last MiB of its weights.

    Raises:
        SystemExit: It is not there.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SystemExit(f"{folder} holds no model; run the step fetch first")
    found: list[Any] = [file_digest(folder / name) for name in ("config.json", "tokenizer.json")]
    for file in weights:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 2**20))
            found.append([file.name, file.stat().st_size, hashlib.sha256(stream.read()).hexdigest()])
    return digest_of(found)


def code_digest(folder: Path) -> str:
    """Of all modules below a folder."""
    return digest_of({str(file.relative_to(folder)): file_digest(file) for file in sorted(folder.rglob("*.py"))})


def libraries() -> dict[str, str]:
    """Versions of what is installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
