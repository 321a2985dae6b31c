"""Which tokens two models share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer

from moe_svd_distill.calibration.vocabulary import (
    common_tokens,
    compare_vocabularies,
    read_vocabulary,
    require_shared_vocabulary,
)
from moe_svd_distill.errors import IncompatiblePairError
from tests.calibration.conftest import Kinds
from tests.support.tokenizers import byte_level

TEXTS = ["the cat sat on the mat and the dog sat"] * 4


def _copy(folder: Path, to: Path, *, rows: int | None = None, special: tuple[str, ...] = ()) -> Path:
    shutil.copytree(folder, to)
    inner = FastTokenizer.from_file(str(to / "tokenizer.json"))
    inner.add_special_tokens(list(special))
    inner.save(str(to / "tokenizer.json"))
    if rows is not None:
        (to / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return to


def test_padding_of_the_head_and_more_special_tokens_do_not_matter(tmp_path: Path) -> None:
    base = byte_level(tmp_path / "base", TEXTS, 280)
    size = read_vocabulary(base).size
    teacher = _copy(base, tmp_path / "teacher", rows=size + 300, special=("<think>", "</think>"))
    student = _copy(base, tmp_path / "student", rows=size + 5)
    for one, other in ((teacher, student), (student, teacher)):
        comparison = require_shared_vocabulary(one, other)
        assert (comparison.equal, comparison.shared) == (True, size)
        assert comparison.common == comparison.teacher_tokens == comparison.student_tokens == size - 1


def test_a_row_in_a_nested_configuration_counts(tmp_path: Path) -> None:
    base = byte_level(tmp_path / "base", TEXTS, 280)
    size = read_vocabulary(base).size
    (base / "config.json").write_text(json.dumps({"text_config": {"vocab_size": size + 7}}))
    assert read_vocabulary(base).rows == size + 7


def test_tokens_without_a_row_cannot_be_compared(tmp_path: Path) -> None:
    base = byte_level(tmp_path / "base", TEXTS, 280)
    size = read_vocabulary(base).size
    student = _copy(base, tmp_path / "student", rows=size, special=("<think>",))
    assert compare_vocabularies(student, student).shared == size
    cut = _copy(base, tmp_path / "cut", rows=size - 10)
    comparison = compare_vocabularies(base, cut)
    assert (comparison.equal, comparison.shared) == (False, size - 10)
    assert f"the student's head has {size - 10} rows for {size} tokens" in comparison.reasons
    assert comparison.common == size - 11


def test_a_refusal_says_what_both_have_and_what_to_do(kinds: Kinds) -> None:
    with pytest.raises(IncompatiblePairError) as refusal:
        require_shared_vocabulary(kinds.large, kinds.small)
    comparison = compare_vocabularies(kinds.large, kinds.small)
    share = round(100 * comparison.common / comparison.student_tokens)
    assert f"{comparison.common} tokens are the same text in both" in str(refusal.value)
    assert f"{share} % of the student's" in str(refusal.value)
    assert "vocabulary: shared" in refusal.value.action
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("student", "teacher"), [("small", "large"), ("pieces", "small"), ("large", "pieces")])
def test_common_tokens_read_the_same(kinds: Kinds, student: str, teacher: str) -> None:
    folders = (getattr(kinds, student), getattr(kinds, teacher))
    ids = common_tokens(folders[1], folders[0])
    inner = [FastTokenizer.from_file(str(folder / "tokenizer.json")) for folder in folders]
    # one that decodes alone to the replacement character is a part of a character, and has no text to compare by
    texts = [
        [one.decode([one.token_to_id("a"), token], skip_special_tokens=False)[1:] for token in numbers.tolist()]
        for one, numbers in zip(inner, ids, strict=True)
    ]
    whole = [(mine, other) for mine, other in zip(*texts, strict=True) if "�" not in mine + other]
    assert len(whole) > 300
    assert all(mine == other for mine, other in whole)
    assert len(ids[0]) == compare_vocabularies(folders[1], folders[0]).common
    assert len(set(ids[0].tolist())) == len(set(ids[1].tolist())) == len(ids[0])
    special = {"<end>", "<begin>", "<unk>"}
    assert not special & {one.id_to_token(token) for one, numbers in zip(inner, ids, strict=True) for token in numbers}


def test_spellings_are_recognised(kinds: Kinds) -> None:
    small, pieces = read_vocabulary(kinds.small), read_vocabulary(kinds.pieces)
    assert (small.spelling, pieces.spelling) == ("byte-level", "sentencepiece")
    inner = FastTokenizer.from_file(str(kinds.pieces / "tokenizer.json"))
    assert pieces.numbers[b" the"] == inner.token_to_id("▁the")
    assert pieces.numbers[b"\xff"] == inner.token_to_id("<0xFF>")
    assert pieces.numbers[b"a"] == inner.token_to_id("a")
    assert small.numbers[b" "] == FastTokenizer.from_file(str(kinds.small / "tokenizer.json")).token_to_id("Ġ")


def test_another_spelling_is_refused(kinds: Kinds, tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers

    words = FastTokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##re": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(IncompatiblePairError, match="neither byte-level nor SentencePiece"):
        common_tokens(tmp_path, kinds.small)
