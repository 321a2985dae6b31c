"""How far evaluation text is from calibration text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.calibration.domain import domain_distance, jensen_shannon
from moe_svd_distill.calibration.text import TokenizedText, tokenize
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from tests.calibration.conftest import LAB_TEXT

TOKENIZER = Path(__file__).parents[2] / "lab" / "models" / "llama-student"
_COUNTS = st.lists(st.integers(0, 50), min_size=8, max_size=8).map(lambda counts: np.asarray([*counts, 1]))


def _tokens(documents: list[Document]) -> TokenizedText:
    return tokenize(documents, load_tokenizer(TOKENIZER), length=256)


@pytest.fixture(scope="module")
def kinds_of_text() -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = {}
    for line in LAB_TEXT.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kind = found.setdefault(record["source"].split("/")[0], [])
        kind.append(Document(record["source"], record["text"][:5000]))
    return found


@given(p=_COUNTS, q=_COUNTS)
def test_the_divergence_is_the_textbooks(p: np.ndarray, q: np.ndarray) -> None:
    found = jensen_shannon(p, q)
    assert found == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-9)
    assert found == pytest.approx(jensen_shannon(q, p), abs=1e-12)
    assert -1e-12 <= found <= 1 + 1e-12


def test_code_and_prose_are_different_domains(kinds_of_text: dict[str, list[Document]]) -> None:
    prose, code = (_tokens(documents) for documents in kinds_of_text.values())
    for one, other in ((prose, code), (code, prose)):
        found = domain_distance(one, other)
        assert found.different
        assert found.ratio > 2
        assert found.distance > found.within > 0


@pytest.mark.parametrize("seed", range(4))
def test_two_draws_of_one_text_are_one_domain(kinds_of_text: dict[str, list[Document]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    everything = [document for documents in kinds_of_text.values() for document in documents]
    for documents in (*kinds_of_text.values(), everything):
        order = rng.permutation(len(documents))
        cut = int(len(documents) * rng.uniform(0.3, 0.7))
        first, second = (_tokens([documents[place] for place in part]) for part in (order[:cut], order[cut:]))
        found = domain_distance(first, second, seed=seed)
        assert not found.different
        assert found.ratio < 1.5


def test_it_is_the_same_each_time_and_takes_little_text(kinds_of_text: dict[str, list[Document]]) -> None:
    prose, code = (_tokens(documents[:2]) for documents in kinds_of_text.values())
    assert domain_distance(prose, code) == domain_distance(prose, code)
    assert domain_distance(prose, code).tokens <= prose.tokens
    one_row = tokenize(kinds_of_text["stdlib"][:1], load_tokenizer(TOKENIZER), 16, length=16)
    assert not domain_distance(one_row, one_row).different


def test_padding_is_not_a_token(kinds_of_text: dict[str, list[Document]]) -> None:
    text = _tokens(kinds_of_text["stdlib"])
    filler = np.zeros_like(text.sequences)
    padded = TokenizedText(
        np.concatenate([text.sequences, filler], axis=1),
        np.concatenate([text.document_of_token, filler - 1], axis=1),
        text.sources,
        text.digests,
    )
    assert domain_distance(padded, padded) == domain_distance(text, text)
