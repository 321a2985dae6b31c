"""The text of a run: how it is divided, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.pipeline.lab import lab_pair
from moe_svd_distill.pipeline.pair import open_pair
from moe_svd_distill.pipeline.texts import RunText, read_run_text
from moe_svd_distill.recipe import parse_recipe

LICENCE = "".join(f"permission number{line} is hereby granted free of charge\n" for line in range(40))
SOURCES = "may be larger than on other sources"


def _read(text: Path, stages: tuple[str, ...] = ("calibrated",), **values: Any) -> RunText:
    pair = lab_pair("dense")
    asked = {"tokens": 4096, "scale_search_tokens": 1024, "calibration": [str(text)], **values}
    recipe = parse_recipe({"teacher": str(pair.teacher), "student": str(pair.student), "output": "out", **asked})
    with open_pair(str(pair.teacher), str(pair.student)) as opened:
        return read_run_text(recipe, opened, stages)


def _rows(file: Path, groups: int, field: str = "group", before: str = "") -> Path:
    rows = [
        {"text": before + " ".join(f"own{row}x{n}" for n in range(150)), field: f"g{row % groups}"} for row in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_parts_of_the_lab_text_share_no_package() -> None:
    text = _read(lab_pair("dense").calibration)
    assert text.fit is not None
    assert not set(text.fit.student.groups) & set(text.search.student.groups)
    assert set(text.used_groups) == {group for part in text.parts.values() for group in part.student.groups}
    record = text.record()
    assert record["division"]["divided_by"] == "group"
    assert 0 <= record["division"]["duplicated_share"] < 0.05
    assert record["text"]["search"]["groups"] == len(text.search.student.groups) >= 8
    assert record["shortfalls"] == []


def test_one_source_is_warned_of_in_one_line(tmp_path: Path) -> None:
    text = _read(_rows(tmp_path / "a.jsonl", 1))
    (said,) = text.shortfalls()
    assert SOURCES in said
    assert "text_group" in said
    assert "\n" not in said
    assert text.record()["division"]["divided_by"] == "document"
    assert text.record()["text"]["fit"]["groups"] == 1


def test_a_search_alone_has_nothing_to_be_apart_from(tmp_path: Path) -> None:
    text = _read(_rows(tmp_path / "a.jsonl", 1), stages=("weights",))
    assert text.division is None
    assert text.shortfalls() == []
    assert "division" not in text.record()


def test_many_repetitions_are_named(tmp_path: Path) -> None:
    (said,) = _read(_rows(tmp_path / "a.jsonl", 20, before=LICENCE)).shortfalls()
    assert said.startswith("calibration text: 6")
    assert "removed as blocks that other documents hold" in said


def test_the_recipe_names_the_field(tmp_path: Path) -> None:
    file = _rows(tmp_path / "a.jsonl", 1, field="site")
    assert _read(file).shortfalls() == []
    (said,) = _read(file, text_group="site").shortfalls()
    assert SOURCES in said
    with pytest.raises(BadDataError, match=r"field 'page' \(text_group\)"):
        _read(file, text_group="page")


def test_shares_and_what_was_left_out_are_recorded(tmp_path: Path) -> None:
    first = _rows(tmp_path / "a.jsonl", 60)
    with first.open("a") as file:
        file.write("\n" + json.dumps({"text": " "}) + "\n" + first.read_text().splitlines()[0])
    values = {"calibration": [{"path": str(first), "share": 0.25}, str(tmp_path / "c.csv")]}
    (tmp_path / "c.csv").write_text(
        "text\n" + "".join(" ".join(f"other{n}x{k}" for k in range(150)) + "\n" for n in range(60))
    )
    text = _read(first, **values)
    record = text.record()
    assert (record["read"]["documents"], record["read"]["empty"], record["read"]["copies"]) == (120, 1, 1)
    tokens = record["text"]["fit"]["tokens_by_source"]
    assert sum(tokens.values()) == record["text"]["fit"]["tokens"] == 4096
    assert abs(tokens[str(first)] - 1024) <= 512
    assert record["shortfalls"][:2] == [
        "calibration text: 1 document without text was left out",
        "calibration text: 1 document the same as others but for white space was left out",
    ]


def test_a_source_that_is_too_small_for_its_share_is_said(tmp_path: Path) -> None:
    first, second = _rows(tmp_path / "a.jsonl", 60), tmp_path / "b.jsonl"
    second.write_text("\n".join(json.dumps({"text": " ".join(f"b{n}x{k}" for k in range(60))}) for n in range(9)))
    text = _read(first, calibration=[str(first), {"path": str(second), "share": 0.9}])
    assert any(f"of {second}" in said and "instead of" in said for said in text.shortfalls())
