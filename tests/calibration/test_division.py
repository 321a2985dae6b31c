"""Dividing one text by budgets of tokens."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_svd_distill.calibration.division import divide_text
from moe_svd_distill.calibration.documents import Document, without
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.errors import BadDataError, UsageError
from tests.support.characters import PLAIN

BUDGETS = {"fit": 20_000, "search": 2000}


def _documents(count: int, length: int) -> list[Document]:
    return [Document(str(number), f"{number:06d}" + "x" * (length - 6)) for number in range(count)]


def test_with_enough_text_every_part_has_its_budget_over_many_documents() -> None:
    parts = divide_text(_documents(200, 500), PLAIN, BUDGETS, length=100)
    assert {name: text.tokens for name, text in parts.items()} == BUDGETS
    assert list(parts) == ["fit", "search"]
    assert not any(text.short for text in parts.values())
    assert all(len(text.sources) >= 16 for text in parts.values())


@pytest.mark.parametrize("search", [500, 30_000, 60_000])
def test_more_search_text_leaves_the_parts_before_it_as_they_are(search: int) -> None:
    documents, before = _documents(200, 500), {"check": 2000, "fit": 20_000}
    first, again = (
        divide_text(documents, PLAIN, {**before, "search": tokens}, length=100) for tokens in (2000, search)
    )
    assert again["search"].tokens == search
    for name in before:
        assert first[name].digests == again[name].digests
        assert (first[name].sequences == again[name].sequences).all()


def test_too_little_text_is_shared_out_and_said() -> None:
    parts = divide_text(_documents(100, 500), PLAIN, {"fit": 10**6, "search": 10**5}, length=100)
    assert all(text.short for text in parts.values())
    assert {name: text.asked for name, text in parts.items()} == {"fit": 10**6, "search": 10**5}
    assert 0.1 <= parts["search"].tokens / parts["fit"].tokens <= 0.2
    assert sum(text.tokens for text in parts.values()) > 0.75 * 100 * 500
    assert len(parts["search"].sources) >= 16


def test_a_small_search_keeps_its_budget_beside_a_fit_that_wants_everything() -> None:
    parts = divide_text(_documents(100, 500), PLAIN, {"fit": 10**6, "search": 2000}, length=100)
    assert (parts["search"].tokens, parts["search"].short) == (2000, False)
    assert parts["fit"].short
    assert parts["fit"].tokens > 0.75 * 100 * 500


def test_few_documents_are_cut_into_sections() -> None:
    book = Document("book", "".join(f"line {number} of a long book\n" for number in range(5000)))
    parts = divide_text([book], PLAIN, BUDGETS, length=100)
    assert {name: text.tokens for name, text in parts.items()} == BUDGETS
    assert len(parts["search"].sources) >= 16
    assert without([book], {*parts["fit"].digests}) == ()


def test_documents_with_unknown_tokens_are_in_no_part() -> None:
    documents = [*_documents(200, 500), *(Document(f"é{number}", f"é{number}" * 200) for number in range(20))]
    parts = divide_text(documents, PLAIN, BUDGETS, length=100, vocabulary=128)
    assert max(text.sequences.max() for text in parts.values()) < 128
    everything = divide_text(documents, PLAIN, {"all": 10**9}, length=100, vocabulary=128)["all"]
    assert everything.skipped == 20


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(7, 900), min_size=24, max_size=90),
    fit=st.integers(1, 30_000),
    search=st.integers(1, 4000),
    check=st.integers(1, 4000),
    seed=st.integers(0, 5),
)
def test_no_document_is_in_two_parts_and_no_budget_is_exceeded(
    lengths: list[int], fit: int, search: int, check: int, seed: int
) -> None:
    length = 50
    documents = [Document(str(n), f"{n:06d}" + "x" * (characters - 6)) for n, characters in enumerate(lengths)]
    budgets = {"fit": fit, "search": search, "check": check}
    try:
        parts = divide_text(documents, PLAIN, budgets, length=length, seed=seed)
    except BadDataError:
        assert sum(lengths) < 24 * 3 * length
        return
    for one, other in combinations(parts.values(), 2):
        assert not set(one.digests) & set(other.digests)
    for name, text in parts.items():
        assert text.tokens <= max(budgets[name], length)
        assert text.short == (text.tokens < budgets[name] // length * length)
    wanted = sum(max(budget, length) for budget in budgets.values())
    assert sum(text.tokens for text in parts.values()) >= 0.6 * min(wanted, sum(lengths)) - len(parts) * length
    renamed = [Document(f"x{document.source}", document.text) for document in reversed(documents)]
    again = divide_text(renamed, PLAIN, budgets, length=length, seed=seed)
    assert all((again[name].sequences == text.sequences).all() for name, text in parts.items())


def test_refusals() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        divide_text(_documents(30, 500), PLAIN, {"fit": 0})
    with pytest.raises(BadDataError, match=r"too short: found 60 tokens, expected at least 200"):
        divide_text(_documents(6, 10), PLAIN, BUDGETS, length=100)


def test_with_the_lab_tokenizer(lab_documents: tuple[Document, ...]) -> None:
    folder = Path(__file__).parents[2] / "lab" / "models" / "llama-student"
    parts = divide_text(lab_documents, load_tokenizer(folder), {"fit": 40_000, "search": 8192}, length=512, seed=3)
    assert [text.tokens for text in parts.values()] == [40_000 // 512 * 512, 8192]
    assert len(parts["search"].sources) >= 16
    left = without(lab_documents, {*parts["fit"].digests, *parts["search"].digests})
    assert len(left) == len(lab_documents) - len(parts["fit"].sources) - len(parts["search"].sources)


def test_one_text_over_and_over_is_one_document_not_a_short_text() -> None:
    words = " ".join(f"word{number}" for number in range(900))
    again = [Document("0", f"{words} " * 800)]
    with pytest.raises(BadDataError, match=r"cannot be divided into 3 parts .*found \d different document"):
        divide_text(again, PLAIN, {"fit": 200, "check": 200, "search": 200}, length=100)
