"""The splits of the lab's text."""

import hashlib
import json

import pytest

from lab import corpus
from lab.plan import TEXT


@pytest.fixture(scope="module")
def published():
    return {name: corpus.read_lines(TEXT / f"{name}.jsonl") for name in ("calibration", "heldout")}


def test_published_splits_share_no_file(published):
    calibration = {document.source for document in published["calibration"]}
    heldout = {document.source for document in published["heldout"]}
    train = set(json.loads((TEXT / "MANIFEST.json").read_text("utf-8"))["train"])
    assert not calibration & heldout
    assert not calibration & train
    assert not heldout & train


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_published_splits_hold_code_and_documentation(published, split):
    documents = published[split]
    assert {document.kind for document in documents} == {"stdlib", "documentation"}
    assert len({document.digest for document in documents}) == len(documents)
    assert max(len(document.text) for document in documents) <= corpus.CALIBRATION_CUT


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_published_records_name_the_package_they_are_of(published, split):
    rows = [json.loads(line) for line in (TEXT / f"{split}.jsonl").read_text("utf-8").splitlines()]
    assert [row["group"] for row in rows] == [document.group for document in published[split]]


@pytest.mark.parametrize(("source", "group"), [
    ("stdlib/asyncio/events.py", "asyncio"), ("stdlib/queue.py", "queue"), ("documentation/library/queue.rst", "queue"),
    ("documentation/library/asyncio-task.rst", "asyncio"), ("documentation/library/xml.sax.rst", "xml"),
    ("documentation/c-api/iter.rst", "c-api"), ("documentation/contents.rst", "contents"),
])  # fmt: skip
def test_code_and_pages_of_one_package_are_one_source(source, group):
    assert corpus.Document(source, "text").group == group


def test_notice_carries_the_licence():
    notice = (TEXT / "NOTICE").read_text("utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in notice
    assert "Copyright (c) 2001" in notice


def test_split_is_by_file_and_repeatable(tmp_path):
    for kind in ("a", "b"):
        for index in range(150):
            (tmp_path / f"{kind}{index}.rst").write_text(f"{kind}{index}\n" * 4000)
    (tmp_path / "copy.rst").write_text((tmp_path / "a0.rst").read_text())
    documents = [d for d in corpus.collect(tmp_path) if d.kind == "documentation"]
    assert len(documents) == 300  # the copy counts once
    first, second = corpus.split(documents), corpus.split(list(documents))
    assert first == second
    sources = [{d.source for d in part} for part in (first.train, first.calibration, first.heldout)]
    assert all(sources)
    assert sum(map(len, sources)) == len(set.union(*sources)) == len(documents)


def test_cut_keeps_whole_lines_from_the_beginning():
    document = corpus.Document("stdlib/a.py", "# notice\nline\nanother\n")
    assert document.cut(16).text == "# notice\nline\n"
    assert document.cut(1000) is document


def test_manifest_names_every_training_file():
    corpus_ = corpus.Corpus((corpus.Document("stdlib/a.py", "x"),), (), ())
    content = corpus.manifest(corpus_)
    assert content["train"] == {"stdlib/a.py": hashlib.sha256(b"x").hexdigest()[:16]}
