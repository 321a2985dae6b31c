"""Where two tokenisations have read the same characters."""

from __future__ import annotations

import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.rows import clean_cuts, common_cuts
from moe_svd_distill.calibration.tokenizer import Tokenizer, TokenSpans, load_tokenizer
from tests.calibration.conftest import Kinds

_ALPHABET = st.sampled_from(["the", "import ", "self", "e", "n", " ", "  ", "\n", "\n    ", "\t", "1", "é", "e\u0301"])
_STRANGE = st.sampled_from(["🙂", "👩\u200d💻", "日本", "ｱ", "\u0301", "Ġ", "\xa0", "\r\n", "ß", "\u200b"])
_TEXTS = st.lists(_ALPHABET | _STRANGE | st.characters(codec="utf-8", exclude_characters="▁<"), max_size=40).map(
    "".join
)
_EXAMPLE = "def f(x):\n        return 'é🙂e\u0301'  \n"


@cache
def _inner(folder: Path) -> FastTokenizer:
    return FastTokenizer.from_file(str(folder / "tokenizer.json"))


@cache
def _loaded(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def _decoded(folder: Path, ids: np.ndarray) -> str:
    return str(_inner(folder).decode(ids.tolist(), skip_special_tokens=True))


@pytest.mark.parametrize("name", ["small", "large", "pieces"])
def test_the_spans_are_of_the_tokens_that_encoding_gives(kinds: Kinds, name: str) -> None:
    tokenizer = load_tokenizer(getattr(kinds, name))
    (spans,) = tokenizer.encode_spans([_EXAMPLE])
    assert [spans.ids.tolist()] == tokenizer.encode([_EXAMPLE])
    assert spans.read.all() == (name != "pieces")
    assert spans.end.max() == len(_EXAMPLE)


@pytest.mark.parametrize("name", ["small", "large", "pieces"])
@settings(max_examples=60, deadline=None)
@given(text=_TEXTS)
@example(text=_EXAMPLE)
def test_at_a_cut_exactly_the_characters_before_it_are_read(kinds: Kinds, name: str, text: str) -> None:
    folder = getattr(kinds, name)
    (spans,) = _loaded(folder).encode_spans([text])
    characters, tokens = clean_cuts(spans, len(text))
    decoder = _inner(folder)
    for read, count in zip(characters.tolist(), tokens.tolist(), strict=True):
        assert decoder.decode(spans.ids[:count].tolist(), skip_special_tokens=True) == text[:read]
    assert not text or characters[-1] == len(text)


@pytest.mark.parametrize(("student", "teacher"), [("small", "large"), ("small", "pieces"), ("pieces", "large")])
@settings(max_examples=60, deadline=None)
@given(text=_TEXTS)
@example(text=_EXAMPLE)
def test_decoded_prefixes_are_equal_where_two_align(kinds: Kinds, student: str, teacher: str, text: str) -> None:
    folders = [getattr(kinds, name) for name in (student, teacher)]
    spans = [_loaded(folder).encode_spans([text])[0] for folder in folders]
    cuts = common_cuts(spans[0], spans[1], len(text))
    decoders = [_inner(folder) for folder in folders]
    for counts in cuts:
        first, second = (
            decoder.decode(one.ids[:count].tolist(), skip_special_tokens=True)
            for decoder, one, count in zip(decoders, spans, counts, strict=True)
        )
        assert first == second
    assert all((after > before).all() for before, after in pairwise(cuts))


@settings(max_examples=60, deadline=None)
@given(text=_TEXTS)
@example(text="cafe\u0301 au lait")
def test_a_composed_character_is_not_read_before_its_accent(kinds: Kinds, text: str) -> None:
    folders = (kinds.composing, kinds.large)
    spans = [_loaded(folder).encode_spans([text])[0] for folder in folders]
    for mine, other in common_cuts(spans[0], spans[1], len(text)):
        composed = _decoded(folders[0], spans[0].ids[:mine])
        assert composed == unicodedata.normalize("NFC", _decoded(folders[1], spans[1].ids[:other]))


def test_every_position_aligns_with_itself_between_characters(kinds: Kinds) -> None:
    text = "plain words only\n    and spaces"
    (spans,) = load_tokenizer(kinds.small).encode_spans([text])
    expected = np.repeat(np.arange(1, len(spans.ids) + 1)[:, None], 2, axis=1)
    assert common_cuts(spans, spans, len(text)).tolist() == expected.tolist()


def test_bytes_of_one_character_are_one_step() -> None:
    spans = TokenSpans(
        ids=np.arange(5), begin=np.array([0, 0, 1, 1, 2]), end=np.array([0, 1, 2, 2, 3]), read=np.arange(5) > 0
    )
    characters, tokens = clean_cuts(spans, 3)
    assert (characters.tolist(), tokens.tolist()) == ([1, 2, 3], [2, 4, 5])


def test_how_much_of_the_lab_text_aligns(kinds: Kinds, lab_documents: tuple[Document, ...]) -> None:
    texts = [document.text for document in lab_documents[:20]]
    small, large = (load_tokenizer(folder).encode_spans(texts) for folder in (kinds.small, kinds.large))
    both = zip(texts, small, large, strict=True)
    aligned = sum(len(common_cuts(mine, other, len(text))) for text, mine, other in both)
    of_small = aligned / sum(len(spans.ids) for spans in small)
    of_large = aligned / sum(len(spans.ids) for spans in large)
    assert 0.6 < of_small < of_large < 1.0
