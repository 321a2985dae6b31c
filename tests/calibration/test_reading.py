"""Data sets by name, with a stand-in for the optional package."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_svd_distill.calibration.dataset_rows import DatasetName, parse_dataset
from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError, RemoteError, UsageError

ROWS = [{"text": f"row {number} " + "x" * 100, "body": f"body {number}"} for number in range(1000)]


class _Library(ModuleType):
    """`datasets` as far as it is used: rows of a file of JSON lines, streamed and counted."""

    __version__ = "4.0.0"

    def __init__(self, rows: list[Any], failure: Exception | None = None) -> None:
        super().__init__("datasets")
        self.rows, self.failure, self.taken, self.asked = rows, failure, 0, ((), {})

    def load_dataset(self, *names: Any, **options: Any) -> Iterator[Any]:
        self.asked = (names, options)
        if self.failure is not None:
            raise self.failure
        return self._stream()

    def _stream(self) -> Iterator[Any]:
        for row in self.rows:
            self.taken += 1
            yield row


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> _Library:
    result = _Library(list(ROWS))
    monkeypatch.setitem(sys.modules, "datasets", result)
    return result


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("datasets:org/name", DatasetName("org/name")),
        ("datasets:name:config", DatasetName("name", "config")),
        ("datasets:name:config:test#body", DatasetName("name", "config", "test", "body")),
        ("datasets:name::validation", DatasetName("name", None, "validation")),
        ("datasets:name@v1#body", DatasetName("name", field="body", revision="v1")),
    ],
)
def test_names(source: str, expected: DatasetName) -> None:
    assert parse_dataset(source) == expected
    assert parse_dataset(str(Path(source))) == expected


@pytest.mark.parametrize("source", ["datasets:", "datasets::c", "datasets:a:b:c:d"])
def test_what_is_no_name(source: str) -> None:
    with pytest.raises(UsageError, match="does not name a data set"):
        parse_dataset(source)


def test_rows_are_streamed_up_to_the_limit(library: _Library) -> None:
    documents = read_text(["datasets:org/name:config:test"], limit_characters=1000).documents
    assert library.asked == (("org/name", "config"), {"split": "test", "revision": None, "streaming": True})
    assert sum(len(document.text) for document in documents) >= 1000
    assert library.taken == len(documents) < 12
    assert documents[3].source == "datasets:org/name:config:test:4"


def test_the_field_of_the_name_goes_before_the_general_one(library: _Library) -> None:
    assert read_text(["datasets:a"], field="body", limit_characters=1).documents[0].text == "body 0"
    assert read_text([Path("datasets:a#body")], field="text", limit_characters=1).documents[0].text == "body 0"
    with pytest.raises(BadDataError, match=r"datasets:a:1 has no text in the field 'none'"):
        read_text(["datasets:a"], field="none")


def test_rows_may_be_conversations(library: _Library) -> None:
    library.rows[:] = [{"messages": [{"role": "user", "content": "hello", "tool_calls": None}]}]
    (document,) = read_text(["datasets:a"]).documents
    assert document.chat is not None
    assert document.chat.messages == [{"role": "user", "content": "hello"}]


def test_the_package_is_named_where_it_is_missing_or_old(monkeypatch: pytest.MonkeyPatch, library: _Library) -> None:
    monkeypatch.setattr(library, "__version__", "3.6.0", raising=False)
    with pytest.raises(UsageError, match=r"from version 4 on \(found 3\.6\.0\)"):
        read_text(["datasets:a"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'moe-svd-distill\[datasets\]'"):
        read_text(["datasets:a"])


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (FileNotFoundError("Dataset 'a' doesn't exist on the Hub"), MissingInputError),
        (ValueError("Bad split: test"), MissingInputError),
        (ConnectionError("Couldn't reach the Hub"), RemoteError),
        (RuntimeError("Dataset scripts are no longer supported"), BadDataError),
    ],
)
def test_failures_are_explained(library: _Library, failure: Exception, kind: type[DistillError]) -> None:
    library.failure = failure
    with pytest.raises(kind, match=f"datasets:a .*{str(failure)[:12]}"):
        read_text(["datasets:a"])


def test_with_the_real_package(tmp_path: Path) -> None:
    pytest.importorskip("datasets", minversion="4")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:20]))
    assert [d.text for d in read_text([f"datasets:{tmp_path}#body"]).documents] == [row["body"] for row in ROWS[:20]]
