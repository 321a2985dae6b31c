"""Removing blocks that other documents hold too."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_svd_distill.calibration.chat import as_chat
from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.repeats import WINDOW, Repeats
from tests.support.windows import windows

LICENCE = "".join(f"permission number{line} is hereby granted free of charge\n" for line in range(20))


def _code(name: str, lines: int = 30) -> str:
    return "".join(f"{name}{line} = call_{name}({line})  # {name} {line}\n" for line in range(lines))


def test_a_licence_stays_once_and_goes_at_line_ends_elsewhere() -> None:
    repeats = Repeats()
    first, second = (Document(name, f"# {name}\n{LICENCE}{_code(name)}") for name in ("a", "b"))
    assert repeats.fresh(first) is first
    cut = repeats.fresh(second)
    assert cut is not None
    assert cut.text == "# b\n" + _code("b")
    assert cut.digests == (cut.digest, second.digest)
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
