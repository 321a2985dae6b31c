"""A row of the product: its command line, from the same training text as the others."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import moe_svd_distill
from benchmarks.real_pair.cost import run_measured
from benchmarks.real_pair.places import Places
from benchmarks.real_pair.rows import Row, code_digest, file_digest, model_digest


@dataclass(frozen=True)
class ProductOptions:
    """What the product is asked for.

    Attributes:
        tokens: It is fitted or trained on; its scale search takes more.
        seed: Of every random choice.
        method: As `--method`.
        settings: Recipe keys and values (`key=value`, `section.key=value`).
    """

    tokens: int
    seed: int
    method: str
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its row."""
        parts = ["product", self.method, str(self.tokens), f"s{self.seed}", *self.settings]
        return "-".join(parts).replace("/", "_")


def product(places: Places, options: ProductOptions, name: str | None = None) -> Row:
    """Run the product, unless its row is there."""
    row = Row(places.rows / (name or options.name))
    values = recipe(places, row, options)
    inputs = {
        "kind": "product",
        "values": {key: value for key, value in values.items() if key not in ("teacher", "student", "output")},
        "student_folder": places.student.name,
        "student": model_digest(places.student),
        "teacher": model_digest(places.teacher),
        "text": file_digest(places.text("train")),
    }
    inputs["values"]["calibration"] = "train"

    def make() -> dict[str, Any]:
        file = row.folder / "recipe.yaml"
        if row.adapter.exists() and not _same_recipe(file, values):
            shutil.rmtree(row.adapter)
        row.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "moe_svd_distill", "distill", str(file)]
        cost = run_measured(command, row.folder / "log.txt")
        record = json.loads((row.adapter / "run.json").read_text(encoding="utf-8"))
        kept = ("method", "scale_search", "refinement", "timing")
        code = code_digest(Path(moe_svd_distill.__file__).parent)
        return {"cost": cost, "code": code, "record": {key: record[key] for key in kept if key in record}}

    row.section("row", inputs, make)
    return row


def recipe(places: Places, row: Row, options: ProductOptions) -> dict[str, Any]:
    """The recipe of a row, as plain values."""
    values: dict[str, Any] = {
        "teacher": str(places.teacher),
        "student": str(places.student),
        "output": str(row.adapter),
        "calibration": [str(places.text("train"))],
        "tokens": options.tokens,
        "seed": options.seed,
        "method": options.method,
    }
    for key, value in pairs(options.settings):
        section, _, inner = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[inner] = value
    return values


def pairs(settings: Sequence[str]) -> list[tuple[str, Any]]:
    """`key=value`s with values as YAML reads them.

    Raises:
        SystemExit: One has no `=`.
    """
    found = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise SystemExit(f"--set {setting}: expected key=value")
        found.append((key, yaml.safe_load(value)))
    return found


def _same_recipe(file: Path, values: dict[str, Any]) -> bool:
    """Whether an unfinished run of the same recipe lies there, for the product to go on with."""
    return file.is_file() and yaml.safe_load(file.read_text(encoding="utf-8")) == values
