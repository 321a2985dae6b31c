"""Files of records: arrays, CSV, parquet, and what is refused by name."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.errors import BadDataError, UsageError

ALPACA = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(5)]
SHAREGPT = [{"conversations": [{"from": "human", "value": f"Say {n}."}, {"from": "gpt", "value": f"It is {n}."}]}
            for n in range(5)]  # fmt: skip


def _texts(path: Path, **options: Any) -> list[str]:
    return [document.text for document in read_text([path], **options).documents]


@pytest.mark.parametrize("records", [ALPACA, SHAREGPT])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_array_is_records(tmp_path: Path, records: list[Any], indent: int | None, name: str) -> None:
    file = tmp_path / name
    file.write_text(json.dumps(records, indent=indent))
    found = read_text([file]).documents
    assert [document.text for document in found] == [f"Say {n}.\nIt is {n}." for n in range(5)]
    assert found[2].source == f"{file}:3"
    assert _texts(tmp_path) == _texts(file)


@pytest.mark.parametrize("between", ["\n", "", "\n\n", " , "])
def test_objects_one_after_another(tmp_path: Path, between: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + between.join(json.dumps({"text": f"one {n}"}) for n in range(3000)).encode())
    assert _texts(file) == [f"one {n}" for n in range(3000)]


def test_arrays_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps([{"text": f"one {n}"}, {"text": f"two {n}"}]) for n in (1, 2))
    )
    assert _texts(tmp_path / "a.jsonl") == ["one 1", "two 1", "one 2", "two 2"]


def test_an_array_longer_than_what_is_read_at_a_time(tmp_path: Path) -> None:
    file, long = tmp_path / "a.json", [{"text": f"{n} " + "wört " * 30_000} for n in range(4)]
    file.write_text(json.dumps(long, ensure_ascii=False), encoding="utf-8")
    assert _texts(file) == [record["text"] for record in long]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"text": "a"}, {"text": "b"', r"a\.json:2 is not JSON"),
        ('[{"text": "a"},', r"a\.json:2 is not JSON"),
        ('{"name": "x"}', r"a\.json:1 has no text .*found: name"),
        ("[1, 2]", r"a\.json:1 is not a record"),
        ("nonsense", r"a\.json:1 is not JSON"),
        ("[]", "no text in"),
        ('[{"text": "a"}] and more', r"a\.json:2 is not JSON"),
    ],
)
def test_json_that_is_no_text_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(BadDataError, match=said):
        read_text([tmp_path / "a.json"])


def test_settings_in_a_folder_of_code_stay_text_and_a_note_says_so(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "tsconfig.json").write_text('{ // words\n "strict": true }')
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    (tmp_path / "talks.json").write_text(json.dumps(ALPACA))
    found = read_text([tmp_path])
    assert sum(document.chat is None for document in found.documents) == 3
    assert sum(document.chat is not None for document in found.documents) == 5
    (note,) = found.notes
    assert note.startswith("3 files of JSON or CSV hold no records of a known form and were read as plain text")


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_csv_is_records(tmp_path: Path, name: str, delimiter: str) -> None:
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows([[n, f'line "one", {n};\nline\ttwo' + "x" * 200_000] for n in range(3)])
    assert _texts(tmp_path / name) == [f'line "one", {n};\nline\ttwo' + "x" * 200_000 for n in range(3)]
    assert _texts(tmp_path / name, field="id") == ["0", "1", "2"]
    with pytest.raises(BadDataError, match=r"no text in the field 'none' .found: id, text"):
        read_text([tmp_path / name], field="none")


def test_csv_that_does_not_fit_its_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id\na,1\nb,2,3\n")
    with pytest.raises(BadDataError, match=r"a\.csv:3 has more fields than the 2 of its header"):
        read_text([tmp_path / "a.csv"])


@pytest.mark.parametrize("header", ["text,id,text", "id;text;x;id"])
def test_a_field_that_csv_has_twice_is_named(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\na,1,b,2\n")
    with pytest.raises(BadDataError, match=r"a\.csv:1 has the field '(text|id)' twice"):
        read_text([tmp_path / "a.csv"])


@pytest.mark.parametrize(
    "record",
    [
        {"k" * 100_000: 1},
        {"\x1b[2J": 1},
        {f"field {n}": n for n in range(5000)},
        {"messages": [{"role": "user", "content": [{"type": "\x1b" * 9000}]}]},
        {"conversations": [{"from": ["x"] * 9000, "value": "x"}]},
    ],
)
def test_what_a_record_holds_does_not_flood_the_terminal(tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(BadDataError) as caught:
        read_text([tmp_path / "a.jsonl"])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


def test_parquet_needs_a_package_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in ("a.parquet", "data"):
        (tmp_path / name).write_bytes(b"PAR1 and more")
        with pytest.raises(UsageError, match=r"needs the package 'pyarrow'.*pip install 'moe-svd-distill\[datasets\]'"):
            read_text([tmp_path / name])
    with pytest.raises(UsageError, match="pyarrow"):
        read_text([tmp_path])


def test_parquet_is_records(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist([{**record, "when": None} for record in ALPACA]), file)
    assert _texts(file) == _texts(tmp_path) == [f"Say {n}.\nIt is {n}." for n in range(5)]
    messages = [{"messages": [{"role": "user", "content": "a", "at": b"\xff"}]}]
    parquet.write_table(arrow.Table.from_pylist(messages), file)
    with pytest.raises(BadDataError, match=r"a\.parquet:1 .*holds what JSON cannot"):
        read_text([file])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadDataError, match="not readable as parquet"):
        read_text([file])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl", "words"])
def test_compressed_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a"}'))
    with pytest.raises(BadDataError, match=r"is compressed by gzip, not text\. Unpack"):
        read_text([tmp_path / name])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("letter", ["a", "ö", "a\\n", "\\ud83d\\ude00", "\\ud800"])
def test_a_long_record_is_cut_and_a_note_says_so(tmp_path: Path, name: str, letter: str) -> None:
    text = letter * 20_000
    (tmp_path / name).write_text(text if name == "a.txt" else f'{{"id": 3, "text": "{text}"}}', encoding="utf-8")
    for limit in range(1000, 1013):
        found = read_text([tmp_path / name], limit_characters=limit)
        assert 0 < len(found.documents[0].text) <= limit
        assert any(f"only about the first {limit:,} characters of" in note for note in found.notes)


def test_lines_after_a_long_one_are_read(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "b" * 300_000}), json.dumps({"text": "short"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    sources = {
        document.source[-1] for document in read_text([tmp_path / "a.jsonl"], limit_characters=100_000).documents
    }
    assert sources <= {"1", "2"}
    assert _texts(tmp_path / "a.jsonl") == ["b" * 300_000, "short"]


def test_a_pipe_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("words from elsewhere"))
    writer.start()
    assert _texts(tmp_path / "pipe") == ["words from elsewhere"]
    writer.join()
