"""Reading text, dividing it, and removing blocks that other documents hold too."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_svd_distill.calibration.chat import as_chat
from moe_svd_distill.calibration.documents import (
    Document,
    cut_long_documents,
    in_drawn_order,
    without,
)
from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.calibration.repeats import WINDOW, Repeats
from moe_svd_distill.errors import BadDataError, MissingInputError
from tests.support.windows import windows

LICENCE = "".join(f"permission number{line} is hereby granted free of charge\n" for line in range(20))


def _write(folder: Path, name: str, content: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file


def test_folders_are_read_recursively_in_order_without_hidden_and_binary_kinds(tmp_path: Path) -> None:
    _write(tmp_path, "b.txt", "second")
    _write(tmp_path, "a/deep.md", "first")
    _write(tmp_path, ".git/config.txt", "hidden")
    _write(tmp_path, "weights.bin", "not text")
    _write(tmp_path, "c.jsonl", '{"text": "third"}\n\n{"text": "fourth"}\n{"text": "second"}\n{"text": " "}\n')
    found = read_text([tmp_path]).documents
    assert [document.text for document in found] == ["first", "second", "third", "fourth"]
    assert found[-1].source.endswith("c.jsonl:3")


def test_a_line_separator_inside_a_record_does_not_end_it(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.jsonl", json.dumps({"body": "one\u2028two\x85three"}, ensure_ascii=False))
    assert read_text([file], field="body").documents[0].text == "one\u2028two\x85three"


def test_a_file_named_outright_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    assert read_text([_write(tmp_path, "LICENSE", "words")]).documents[0].text == "words"


def test_files_of_a_folder_that_are_no_text_are_named(tmp_path: Path) -> None:
    _write(tmp_path, "a.txt", "words")
    _write(tmp_path, ".hidden.bin", "")
    _write(tmp_path, "b.bin", "")
    assert read_text([tmp_path]).notes == ("1 file is not text by its name and was left out (the first: b.bin)",)
    for name in ("c.png", "a.gif", "LICENSE"):
        _write(tmp_path, name, "")
    (said,) = read_text([tmp_path]).notes
    assert said == "4 files are not text by their names and were left out (the first: LICENSE, a.gif, b.bin)"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text"', "a.jsonl:2 is not a line of JSON"),
        ("a.jsonl", b'{"content": "x"}', "found: content"),
        ("a.jsonl", b"[1]", "found: int"),
        ("a.jsonl", b"3", "found: int"),
        ("a.jsonl", b'{"text": 3}', "has no text"),
        ("a.txt", b"caf\xe9", "not UTF-8 text (byte 3)"),
        ("a.txt", b"a\0b", "binary"),
        ("a.txt", b"  \n", "no text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadDataError, match=said.replace("(", r"\(").replace(")", r"\)")):
        read_text([tmp_path / name])


def test_missing_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nowhere\.txt does not exist"):
        read_text([tmp_path / "nowhere.txt"])
    with pytest.raises(BadDataError, match="nothing was named"):
        read_text([])


_DOCUMENTS = st.lists(st.text(min_size=1, max_size=300), min_size=30, max_size=60, unique=True)


@given(texts=_DOCUMENTS, seed=st.integers(0, 99))
def test_the_drawn_order_loses_nothing_and_depends_on_no_name(texts: list[str], seed: int) -> None:
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    drawn = in_drawn_order(documents, seed)
    assert sorted(document.text for document in drawn) == sorted(texts)
    renamed = [Document("x" + document.source, document.text) for document in reversed(documents)]
    assert [document.text for document in in_drawn_order(renamed, seed)] == [document.text for document in drawn]


def test_a_single_long_text_is_cut_at_line_ends_into_sections() -> None:
    text = "".join(f"line {number} of a long book\n" for number in range(3000))
    sections = sorted(in_drawn_order([Document("book", text)]), key=lambda d: int(d.source.split("#")[1]))
    assert len(sections) >= 24
    assert "".join(section.text for section in sections) == text
    assert all(section.text.endswith("\n") for section in sections)


def test_a_text_without_lines_is_cut_anyway() -> None:
    sections = cut_long_documents([Document("blob", "ab" * 50_000)])
    assert "".join(section.text for section in sections) == "ab" * 50_000
    assert len(sections) >= 24


def test_used_text_is_recognised_under_another_name_and_as_the_whole_of_used_sections() -> None:
    book = Document("book", "\n".join(f"line {number}" for number in range(5000)))
    used = {digest for section in cut_long_documents([book])[:3] for digest in section.digests}
    assert without([Document("copy", book.text), Document("new", "new")], used) == (Document("new", "new"),)
    assert len(without(cut_long_documents([book]), used)) == len(cut_long_documents([book])) - 3


def _code(name: str, lines: int = 30) -> str:
    return "".join(f"{name}{line} = call_{name}({line})  # {name} {line}\n" for line in range(lines))


def test_a_licence_stays_once_and_goes_at_line_ends_elsewhere() -> None:
    repeats = Repeats()
    first, second = (Document(name, f"# {name}\n{LICENCE}{_code(name)}") for name in ("a", "b"))
    assert repeats.fresh(first) is first
    cut = repeats.fresh(second)
    assert cut is not None
    assert cut.text == "# b\n" + _code("b")
    assert cut.digests == (cut.identity, second.identity)
    assert repeats.removed == len(LICENCE.split())
    assert repeats.share == pytest.approx(repeats.removed / repeats.words)


def test_case_punctuation_and_width_do_not_hide_a_block() -> None:
    repeats = Repeats()
    repeats.fresh(Document("a.py", "".join(f"# {line}\n" for line in LICENCE.splitlines()) + _code("a")))
    words = LICENCE.upper().split()
    wide = "".join("// " + " ".join(words[at : at + 15]) + ";\n" for at in range(0, len(words), 15))
    cut = repeats.fresh(Document("b.c", wide + _code("b")))
    assert cut is not None
    assert cut.text == _code("b")


def test_inside_a_long_line_words_are_cut() -> None:
    repeats = Repeats()
    block = LICENCE.replace("\n", " ").strip()
    repeats.fresh(Document("a", block))
    before, after = (" ".join(f"{side}{n}" for n in range(40)) for side in ("before", "after"))
    cut = repeats.fresh(Document("b", f"{before} {block} {after}"))
    assert cut is not None
    assert cut.text.split() == [*before.split(), *after.split()]


def test_a_copy_under_other_white_space_is_left_out_and_counted() -> None:
    repeats = Repeats()
    repeats.fresh(Document("a", _code("a")))
    assert repeats.fresh(Document("b", _code("a").replace("\n", "\r\n\n"))) is None
    assert (repeats.left_out, repeats.share) == (1, 0.5)


def test_short_texts_and_repetitions_inside_a_document_stay() -> None:
    repeats = Repeats()
    short = Document("short", " ".join(f"word{n}" for n in range(WINDOW - 1)))
    again = Document("again", short.text + "\n")
    table = Document("table", "0, 1, 2\n" * 200)
    assert [repeats.fresh(document) for document in (short, again, table)] == [short, again, table]
    assert repeats.removed == 0


def test_writing_without_spaces_counts_by_characters() -> None:
    repeats = Repeats()
    shared = "".join(chr(0x4E00 + n) for n in range(60))
    repeats.fresh(Document("a", shared))
    cut = repeats.fresh(Document("b", "".join(chr(0x5E00 + n) for n in range(60)) + "\n" + shared))
    assert cut is not None
    assert cut.text == "".join(chr(0x5E00 + n) for n in range(60)) + "\n"


def test_conversations_are_whole_or_left_out() -> None:
    def talk(name: str, said: str) -> Document:
        messages = [{"role": "system", "content": LICENCE}, {"role": "user", "content": said}]
        return Document.of_chat(name, as_chat(messages, {}))

    repeats = Repeats()
    first, mostly, little = talk("a", _code("a")), talk("b", "how are you"), talk("c", _code("c", 60))
    assert repeats.fresh(first) is first
    assert repeats.fresh(mostly) is None
    assert repeats.fresh(little) is little
    assert repeats.left_out == 1


def test_the_share_of_an_unread_text_is_asked_for_without_reading_it() -> None:
    repeats = Repeats()
    repeats.fresh(Document("a", LICENCE))
    assert repeats.repeated_share(LICENCE + _code("b")) == pytest.approx(160 / (160 + 30 * 5))
    assert repeats.repeated_share(_code("b")) == repeats.repeated_share(_code("b")) == 0
    assert repeats.repeated_share("") == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), blocks=st.integers(1, 6), documents=st.integers(2, 12), words=st.integers(1, 4))
def test_no_window_comes_back_twice(seed: int, blocks: int, documents: int, words: int) -> None:
    """Few blocks of few different words, so that what is joined by a cut is often a repetition in turn."""
    rng = random.Random(seed)
    made = [" ".join(rng.choice("abcd"[:words]) for _ in range(rng.randint(10, 60))) for _ in range(blocks)]
    repeats = Repeats()
    seen: set[tuple[str, ...]] = set()
    for number in range(documents):
        text = "".join(rng.choice(made) + rng.choice([" ", "\n", ".\n\n"]) for _ in range(rng.randint(1, 8)))
        fresh = repeats.fresh(Document(str(number), text))
        found = windows(fresh.text) if fresh else set()
        assert not seen & found
        seen |= found
        assert fresh is not None or windows(text)
    assert 0 <= repeats.removed <= repeats.words
