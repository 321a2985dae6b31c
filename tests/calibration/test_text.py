"""Tokenising, packing, and comparing vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.text import tokenize
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.calibration.vocabulary import compare_vocabularies, require_shared_vocabulary
from moe_svd_distill.errors import BadDataError, IncompatiblePairError, MissingInputError
from tests.support.language import write_tokenizer

TEXTS = ["the cat sat on the mat and the dog sat on the cat"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(result, TEXTS)
    return result


def test_documents_are_packed_in_order_and_separated(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    documents = [Document("a", "the cat"), Document("b", "the dog sat"), Document("c", "mat")]
    packed = tokenize(documents, tokenizer, length=2)
    flat = [token for ids in tokenizer.encode([d.text for d in documents]) for token in [*ids, 0]]
    kept = len(flat) // 2 * 2
    assert tokenizer.end_of_text == 0
    assert packed.sequences.dtype == np.int64
    assert packed.sequences.flatten().tolist() == flat[:kept]
    ends = np.flatnonzero(packed.sequences.flatten() == 0)
    assert packed.document_of_token.flatten()[ends].tolist() == list(range(len(ends)))
    assert packed.predicted == packed.tokens // 2


def test_the_limit_is_met_in_whole_sequences_and_stops_the_reading(folder: Path) -> None:
    documents = [Document(str(number), f"{number} the cat sat on the mat") for number in range(1000)]
    packed = tokenize(documents, load_tokenizer(folder), 100, length=16)
    assert packed.sequences.shape == (6, 16)
    assert len(packed.sources) < 40
    assert set(packed.digests) == {document.identity for document in documents[: len(packed.sources)]}


def test_a_limit_is_spread_over_documents(folder: Path) -> None:
    documents = [Document(str(number), "the cat sat on the mat " * 500) for number in range(40)]
    packed = tokenize(documents, load_tokenizer(folder), 4096, length=16)
    assert packed.tokens == 4096
    assert len(packed.sources) == 24
    counts = np.bincount(packed.document_of_token.flatten())
    assert counts[:-1].max() <= 4096 // 24 + 1


def test_few_documents_give_evenly_what_is_wanted(folder: Path) -> None:
    documents = [Document("short", "the cat"), *(Document(str(n), "the cat sat on " * 900) for n in range(2))]
    packed = tokenize(documents, load_tokenizer(folder), 4096, length=16)
    assert packed.tokens == 4096
    counts = np.bincount(packed.document_of_token.flatten())
    assert abs(int(counts[1]) - int(counts[2])) < 16
    everything = tokenize(documents, load_tokenizer(folder), 10**6, length=16)
    assert everything.tokens == tokenize(documents, load_tokenizer(folder), length=16).tokens


def test_standard_errors_are_over_documents_or_else_sequences(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    many = tokenize([Document(str(n), f"the cat {n}") for n in range(40)], tokenizer, length=8)
    one = tokenize([Document("one", "the cat sat on the mat " * 40)], tokenizer, length=8)
    assert (many.unit, one.unit) == ("documents", "sequences")
    assert one.units()[:, 0].tolist() == list(range(len(one.sequences)))


def test_documents_with_tokens_one_model_lacks_are_skipped(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    highest = max(tokenizer.encode(["the cat sat"])[0])
    documents = [Document("a", "the cat sat"), Document("b", "a b c d e f g")]
    packed = tokenize(documents, tokenizer, length=4, vocabulary=highest)
    assert (packed.skipped, packed.sources) == (1, ("b",))


def test_too_short(folder: Path) -> None:
    with pytest.raises(BadDataError, match=r"too short: found \d+ tokens, expected at least 512"):
        tokenize([Document("a", "the cat")], load_tokenizer(folder))


def test_the_fast_way_agrees_with_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    assert load_tokenizer(folder).encode(TEXTS) == expected


def test_the_end_of_text_token_is_found_in_the_model_settings(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    assert load_tokenizer(tmp_path).end_of_text is None
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert load_tokenizer(tmp_path).end_of_text == 5


def test_same_tokenizer(folder: Path) -> None:
    comparison = compare_vocabularies(folder, folder)
    assert comparison.equal
    assert comparison.reasons == ()
    assert comparison.shared == 320 or comparison.shared > 256


def test_added_special_tokens_of_one_side_do_not_matter(folder: Path, tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path, TEXTS, extra=("<think>",))
    comparison = require_shared_vocabulary(tmp_path, folder)
    assert comparison.shared == size - 1
    assert "<think>" in " ".join(comparison.reasons)


def test_different_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["completely other words in this training text"] * 3)
    assert not compare_vocabularies(folder, tmp_path).equal
    with pytest.raises(IncompatiblePairError, match="different vocabularies"):
        require_shared_vocabulary(folder, tmp_path)


def test_no_tokenizer_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadDataError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)
