"""Text of several sources by shares, and no more of it in memory than is asked for."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from moe_svd_distill.calibration.division import divide_text, divided_by_share
from moe_svd_distill.calibration.documents import LONGEST, Document, Portion, cut_long_documents, without
from moe_svd_distill.calibration.reading import enough_characters, read_text
from moe_svd_distill.calibration.sources import OTHERS, read_sources
from moe_svd_distill.calibration.text import tokenize
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.recipe import text_sources
from tests.support.tokenizers import byte_level


def _words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("sources") / "student", [_words(0, 2000)], 400)


def _file(path: Path, seed: int, documents: int = 60, **fields: object) -> Path:
    records = [{"text": _words(1000 * seed + n, 120), **fields} for n in range(documents)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


BUDGETS = {"validation": 1024, "fit": 8192, "search": 2048}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.75])
def test_every_part_is_of_the_shares(tmp_path: Path, folder: Path, share: float) -> None:
    a, b = _file(tmp_path / "a.jsonl", 1), _file(tmp_path / "b.jsonl", 2)
    sources = text_sources([{"path": a, "share": share}, b])
    read = read_sources(sources, field=None, group_field=None, tokens=8192)
    parts = divide_text(read.documents, load_tokenizer(folder), BUDGETS, length=64)
    for name, part in parts.items():
        tokens = {portion.name: count for portion, count in part.tokens_by_portion().items()}
        assert part.tokens == BUDGETS[name]
        assert tokens.keys() == {str(a), OTHERS}
        assert abs(tokens[str(a)] - share * part.tokens) <= 128
        # From all over both, not one after the other.
        assert len(set(part.portions[:12])) == 2 or share == 0.1
    digests = [set(part.digests) for part in parts.values()]
    assert len(set().union(*digests)) == sum(map(len, digests))


def test_a_group_of_two_sources_is_in_one_part(tmp_path: Path, folder: Path) -> None:
    a = [Document(f"a{n}", _words(n, 400), group=f"g{n % 6}") for n in range(48)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d.text, "group": d.group}) for d in a[:24]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": d.text, "group": d.group}) for d in a[24:]))
    _file(tmp_path / "c.jsonl", 7, 40)
    sources = text_sources([{"path": tmp_path / "a.jsonl", "share": 0.5}, tmp_path / "b.jsonl", tmp_path / "c.jsonl"])
    read = read_sources(sources, field=None, group_field=None, tokens=8192)
    parts = divide_text(read.documents, load_tokenizer(folder), {"fit": 2048, "search": 1024}, length=64)
    assert not set(parts["fit"].groups) & set(parts["search"].groups)


def test_without_shares_there_is_one_pool_and_a_field_of_its_own(tmp_path: Path) -> None:
    a = _file(tmp_path / "a.jsonl", 1, 3)
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "words", "text": 3}))
    read = read_sources(
        text_sources([a, {"path": tmp_path / "b.jsonl", "field": "body"}]), field=None, group_field=None, tokens=9
    )
    assert [document.portion for document in read.documents] == [None] * 4
    assert read.counts["documents"] == 4


def test_whole_numbers_in_proportion() -> None:
    assert divided_by_share(10, [0.3, 0.7]) == [3, 7]
    assert divided_by_share(10, [1 / 3] * 3) == [4, 3, 3]
    assert divided_by_share(2, [0.01, 0.99]) == [1, 2]
    assert divided_by_share(7, [1.0]) == [7]


def test_of_more_text_documents_are_drawn_by_content(tmp_path: Path) -> None:
    file = _file(tmp_path / "a.jsonl", 3, 400)
    everything = read_text([file]).documents
    some = read_text([file], limit_characters=50_000)
    assert 50_000 <= sum(len(document.text) for document in some.documents) < 52_000
    assert "characters are used, drawn by content" in some.notes[0]
    lines = file.read_text().splitlines()
    random.Random(0).shuffle(lines)
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(lines))
    assert {d.text for d in read_text([other], limit_characters=50_000).documents} == {d.text for d in some.documents}
    more = {document.text for document in read_text([file], limit_characters=100_000).documents}
    assert {document.text for document in some.documents} < more < {document.text for document in everything}


def test_memory_is_by_what_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with file.open("w") as sink:
        for n in range(60):
            sink.write(json.dumps({"text": f"{n} " + "the cat sat on the mat " * 20_000}) + "\n")
    assert file.stat().st_size > 25_000_000
    tracemalloc.start()
    read_text([file], limit_characters=1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12_000_000
    assert enough_characters(2048) == enough_characters(65_536) < enough_characters(10_000_000)


class _Counting:
    """A tokenizer that remembers how many characters it was given at a time."""

    end_of_text = 0

    def __init__(self) -> None:
        self.most = self.total = 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        characters = sum(map(len, texts))
        self.most, self.total = max(self.most, characters), self.total + characters
        return [[7] * (len(text) // 4) for text in texts]


@pytest.mark.parametrize("documents", [1, 30])
def test_a_long_document_is_tokenised_only_as_far_as_it_is_needed(documents: int) -> None:
    text = "".join(f"line {n} of a long record\n" for n in range(800_000))
    given = [Document("long", text), *(Document(str(n), _words(n, 100)) for n in range(documents - 1))]
    for run in (
        lambda tokenizer: divide_text(given, tokenizer, {"fit": 2048, "search": 2048}, length=64),
        lambda tokenizer: tokenize(cut_long_documents(given), tokenizer, 2048, length=64),
    ):
        tokenizer = _Counting()
        run(tokenizer)
        assert tokenizer.most <= 1 << 20
        assert tokenizer.total < 5_000_000


def test_the_same_text_but_for_white_space_is_the_same(tmp_path: Path) -> None:
    for name, text in (("a.txt", "one\ntwo é\n"), ("b.txt", "one\r\n\ttwo  e\u0301"), ("c.txt", "one\ntwo e\n")):
        (tmp_path / name).write_text(text, newline="", encoding="utf-8")
    read = read_text([tmp_path])
    assert [document.source[-5:] for document in read.documents] == ["a.txt", "c.txt"]
    assert read.notes == ("1 document the same as others but for white space was left out",)
    assert without([Document("x", " one two é")], read.documents[0].digests) == ()
    # As earlier versions wrote it down.
    assert without([Document("x", "one\ntwo é\n")], {read.documents[0].digest}) == ()


def test_sections_of_a_text_are_all_of_it_however_many_documents_there_are() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, size))) for size in (10, 3 * LONGEST, 100)]
    sections = cut_long_documents([Document(str(n), text) for n, text in enumerate(texts)], minimum=0)
    assert "".join(section.text for section in sections) == "".join(texts)
    assert max(len(section.text) for section in sections) < 2 * LONGEST
    assert len(sections) > 3


def test_no_documents_are_too_short_a_text(folder: Path) -> None:
    with pytest.raises(BadDataError, match="too short: found 0 tokens"):
        divide_text([], load_tokenizer(folder), {"all": 100}, length=64)


def test_a_source_whose_groups_another_has_given_is_named(folder: Path) -> None:
    halves = [Portion("a", 0.5), Portion("b", 0.5)]
    documents = [Document(f"{p.name}{n}", _words(n, 300), group="one", portion=p) for p in halves for n in range(30)]
    with pytest.raises(BadDataError, match="Nothing of b is left for its share"):
        divide_text(documents, load_tokenizer(folder), {"all": 4096}, length=64)
