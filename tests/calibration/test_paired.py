"""One text for two tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.paired import PairedText, PairTokenizers
from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.errors import BadDataError, IncompatiblePairError
from tests.calibration.conftest import Kinds

BUDGETS = {"fit": 12_000, "search": 4000}
LENGTH = 128


def _seen(text: TokenizedText, folder: Path, position: int) -> str:
    """What a model has read up to a position: its row's text, document ends as line of their own."""
    row, place = divmod(int(position), text.length)
    owners = text.document_of_token[row, : place + 1]
    inner = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    parts = [text.sequences[row, : place + 1][owners == owner].tolist() for owner in dict.fromkeys(owners.tolist())]
    return "\n---\n".join(inner.decode(part, skip_special_tokens=True) for part in parts)


@pytest.mark.parametrize(("student", "teacher"), [("small", "large"), ("large", "small")])
def test_both_have_the_same_context_where_they_align(
    kinds: Kinds, lab_documents: tuple[Document, ...], student: str, teacher: str
) -> None:
    folders = (getattr(kinds, student), getattr(kinds, teacher))
    parts = PairTokenizers(folders[1], folders[0], "shared").parts(lab_documents, BUDGETS, length=LENGTH)
    text = parts["fit"]
    assert not text.identical
    assert text.student.sequences.shape == text.teacher.sequences.shape
    assert text.student.sources == text.teacher.sources
    assert (np.diff(text.student_position) > 0).all()
    assert (np.diff(text.teacher_position) > 0).all()
    chosen = np.random.default_rng(0).choice(len(text.student_position), 200, replace=False)
    for place in chosen:
        mine = _seen(text.student, folders[0], text.student_position[place])
        assert mine == _seen(text.teacher, folders[1], text.teacher_position[place])
        assert mine


def test_pieces_and_bytes(kinds: Kinds, lab_documents: tuple[Document, ...]) -> None:
    text = PairTokenizers(kinds.pieces, kinds.small, "shared").parts(lab_documents, {"fit": 8000}, length=LENGTH)["fit"]
    rows = text.student_position // LENGTH
    assert (rows == text.teacher_position // LENGTH).all()
    assert set(rows) == set(range(len(text.student.sequences)))
    for place in range(0, len(text.student_position), 97):
        mine = _seen(text.student, kinds.small, text.student_position[place])
        other = _seen(text.teacher, kinds.pieces, text.teacher_position[place])
        assert mine == other or mine == " " + other  # a row that begins within a text has its space stripped


def test_padding_counts_for_nothing_and_budgets_are_met(kinds: Kinds, lab_documents: tuple[Document, ...]) -> None:
    parts = PairTokenizers(kinds.large, kinds.small, "shared").parts(lab_documents, BUDGETS, length=LENGTH)
    assert list(parts) == list(BUDGETS)
    for name, text in parts.items():
        assert 0 <= text.student.tokens - BUDGETS[name] // LENGTH * LENGTH < LENGTH
        assert not text.student.short
        for side, positions in ((text.student, text.student_position), (text.teacher, text.teacher_position)):
            owners = side.document_of_token
            assert (owners.reshape(-1)[positions] >= 0).all()
            assert side.tokens == (owners >= 0).sum() < owners.size
            assert side.predicted == (owners[:, 1:] >= 0).sum()
            padded = owners < 0
            assert (np.diff(padded.astype(int), axis=1) >= 0).all()
            assert not padded[:, 0].any()
        assert 0.5 < text.aligned < 1.0
    assert not set(parts["fit"].student.digests) & set(parts["search"].student.digests)


def test_every_token_of_the_documents_is_there_in_order(kinds: Kinds, lab_documents: tuple[Document, ...]) -> None:
    text = PairTokenizers(kinds.large, kinds.small, "shared").parts(lab_documents[:40], {"all": 10**8}, length=LENGTH)[
        "all"
    ]
    by_source = {document.source: document.text for document in lab_documents}
    for side, folder in ((text.student, kinds.small), (text.teacher, kinds.large)):
        tokenizer = load_tokenizer(folder)
        flat, owners = side.sequences.reshape(-1), side.document_of_token.reshape(-1)
        for number, source in enumerate(side.sources[:-1]):
            *tokens, end = flat[owners == number].tolist()
            assert tokens == tokenizer.encode([by_source[source]])[0][: len(tokens)]
            assert end == tokenizer.end_of_text
    assert text.student.short


def test_equal_vocabularies_pair_every_position(
    kinds: Kinds, lab_documents: tuple[Document, ...], tmp_path: Path
) -> None:
    student = shutil.copytree(kinds.small, tmp_path / "student")
    inner = FastTokenizer.from_file(str(student / "tokenizer.json"))
    size = inner.get_vocab_size()
    inner.add_special_tokens(["<think>"])
    inner.save(str(student / "tokenizer.json"))
    for mode in ("equal", "shared"):
        parts: dict[str, PairedText] = PairTokenizers(
            kinds.small, student, "shared" if mode == "shared" else "equal"
        ).parts(lab_documents, BUDGETS, length=LENGTH)
        text = parts["search"]
        assert text.identical
        assert text.aligned == 1.0
        assert text.student_position.tolist() == text.teacher_position.tolist() == list(range(text.student.tokens))
        assert text.student_ids.tolist() == text.teacher_ids.tolist() == list(range(size))


def test_different_vocabularies_are_refused_unless_asked_for(kinds: Kinds, lab_documents: tuple[Document, ...]) -> None:
    with pytest.raises(IncompatiblePairError, match="vocabulary: shared"):
        PairTokenizers(kinds.large, kinds.small)


def test_documents_with_tokens_a_head_has_no_row_for_are_skipped(
    kinds: Kinds, lab_documents: tuple[Document, ...], tmp_path: Path
) -> None:
    teacher = shutil.copytree(kinds.large, tmp_path / "teacher")
    rows = FastTokenizer.from_file(str(teacher / "tokenizer.json")).get_vocab_size() - 20
    (teacher / "config.json").write_text(json.dumps({"vocab_size": rows}))
    text = PairTokenizers(teacher, kinds.small, "shared").parts(lab_documents, {"all": 10**8}, length=LENGTH)["all"]
    assert 0 < text.student.skipped < len(lab_documents)
    assert text.teacher.sequences.max() < rows
    assert text.teacher_ids.max() < rows


def test_too_little_text(kinds: Kinds) -> None:
    with pytest.raises(BadDataError, match="too short"):
        PairTokenizers(kinds.large, kinds.small, "shared").parts([Document("a", "few words")], BUDGETS, length=LENGTH)
