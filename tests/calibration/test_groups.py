"""Which source every document belongs to, and that no source is in two parts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_svd_distill.calibration.division import divide, divide_text
from moe_svd_distill.calibration.documents import Document, cut_long_documents, without_groups
from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.errors import BadDataError
from tests.support.characters import PLAIN
from tests.support.windows import windows

BUDGETS = {"fit": 20_000, "search": 2000}


def _records(folder: Path, *rows: dict[str, Any], name: str = "a.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def _text(name: str, words: int) -> str:
    return "".join(f"{name}{n}" + ("\n" if n % 8 == 7 else " ") for n in range(words))


@pytest.mark.parametrize(("row", "group"), [
    ({"group": "g", "repo": "r"}, "g"), ({"repo": " r "}, "r"), ({"package": {"name": "p"}, "repo_name": "n"}, "n"),
    ({"group": "", "repository": "y"}, "y"), ({"repo": None}, None), ({"group": True}, None), ({}, None),
])  # fmt: skip
def test_a_record_names_its_source(tmp_path: Path, row: dict[str, Any], group: str | None) -> None:
    (document,) = read_text([_records(tmp_path, {"text": "words", **row})]).documents
    assert document.group == group


def test_a_conversation_names_its_source_too_and_is_one_by_itself_otherwise(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    other = [*talk, {"role": "user", "content": "bye"}]
    first, second = read_text(
        [_records(tmp_path, {"messages": talk, "conversation_id": "c"}, {"messages": other})]
    ).documents
    assert first.group == "c"
    assert second.group_digest == second.identity


def test_numbers_name_sources_of_their_own_file_only(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}", "conversation_id": n // 2} for n in range(4)]
    others = [{"text": f"others {n}", "conversation_id": n // 2} for n in range(4)]
    found = read_text([_records(tmp_path, *rows), _records(tmp_path, *others, name="b.jsonl")]).documents
    digests = [document.group_digest for document in found]
    assert [digests.index(digest) for digest in digests] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_the_field_that_is_named_counts_alone(tmp_path: Path) -> None:
    file = _records(tmp_path, {"text": "one", "site": "s", "repo": "r"}, {"text": "two", "repo": "r"})
    assert [document.group for document in read_text([file], group_field="site").documents] == ["s", None]


def test_files_belong_to_the_sub_folder_where_there_are_several(tmp_path: Path) -> None:
    for name in ("one/a.txt", "one/deep/b.txt", "two/c.txt", "d.txt", ".git/e.txt", "images/f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    _records(tmp_path / "two", {"text": "a record"}, name="records.jsonl")
    found = {Path(document.source).name: document.group for document in read_text([tmp_path]).documents}
    assert found == {"a.txt": "one", "b.txt": "one", "c.txt": "two", "d.txt": None, "records.jsonl:1": None}
    alone = read_text([tmp_path / "one", tmp_path / "two/c.txt"]).documents
    assert [document.group for document in alone] == [None, None, None]


def test_sections_stay_in_the_group_of_their_document() -> None:
    book, tale = Document("book", _text("book", 2000), group="g"), Document("tale", _text("tale", 2000))
    for document in (book, tale):
        sections = cut_long_documents([document])
        assert len(sections) > 10
        assert {section.group_digest for section in sections} == {document.group_digest}
    assert book.group_digest != tale.group_digest == tale.identity
    assert without_groups([book, tale], {book.group_digest}) == (tale,)


def test_two_files_of_one_folder_are_never_in_both_parts(tmp_path: Path) -> None:
    for package in range(12):
        for file in range(6):
            path = tmp_path / f"package{package}" / "src" / f"file{file}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_text(f"word{package}x{file}x", 150))
    for seed in range(5):
        parts = divide(read_text([tmp_path]).documents, PLAIN, BUDGETS, length=100, vocabulary=None, seed=seed)
        folders = [{Path(one.source).parent.parent.name for one in part.documents} for part in parts.values()]
        assert not folders[0] & folders[1]
        assert len(folders[1]) >= 4
        assert all(part.division.apart for part in parts.values())
        assert {name: part.wanted for name, part in parts.items()} == BUDGETS


def test_renamed_files_and_folders_change_nothing(tmp_path: Path) -> None:
    rng = random.Random(1)
    for root, names in (("one", range(8)), ("two", rng.sample(range(100), 8))):
        for package, name in enumerate(names):
            for file in range(5):
                path = tmp_path / root / f"p{name}" / f"{rng.randint(0, 10**9)}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(LICENCE + _text(f"w{package}x{file}x", 150))
    first, second = (
        divide_text(read_text([tmp_path / root]).documents, PLAIN, BUDGETS, length=100, seed=7)
        for root in ("one", "two")
    )
    assert first["search"].division == second["search"].division
    assert all((first[name].sequences == second[name].sequences).all() for name in BUDGETS)


LICENCE = _text("licence", 120)


def test_one_source_is_divided_by_documents_and_says_so() -> None:
    files = [Document(str(n), _text(f"a{n}x", 200), group="only") for n in range(60)]
    parts = divide_text(files, PLAIN, BUDGETS, length=100)
    assert all(text.division is not None and not text.division.apart for text in parts.values())
    assert {name: text.tokens for name, text in parts.items()} == BUDGETS
    assert not set(parts["fit"].digests) & set(parts["search"].digests)
    assert len(parts["search"].sources) >= 16


def test_a_source_too_small_for_a_part_does_not_starve_it() -> None:
    large = [Document(str(n), _text(f"a{n}x", 400), group="large") for n in range(60)]
    parts = divide_text([*large, Document("small", _text("b", 20))], PLAIN, BUDGETS, length=100)
    assert parts["search"].division is not None
    assert not parts["search"].division.apart
    assert {name: text.tokens for name, text in parts.items()} == BUDGETS


def test_the_small_part_gets_the_small_sources_where_text_is_short() -> None:
    sizes = {"huge": 60, "b": 4, "c": 4, "d": 4}
    files = [
        Document(f"{name}{n}", _text(f"{name}{n}x", 100), group=name)
        for name, count in sizes.items()
        for n in range(count)
    ]
    total = sum(len(file.text) for file in files)
    for seed in range(8):
        parts = divide_text(files, PLAIN, {"fit": 10**6, "search": 4000}, length=100, seed=seed)
        assert parts["search"].division is not None
        assert parts["search"].division.apart
        assert parts["search"].tokens >= 2500
        assert parts["fit"].tokens > 0.6 * total


def test_a_large_source_is_not_read_whole_for_a_small_part() -> None:
    read: list[int] = []

    class Counting(type(PLAIN)):  # type: ignore[misc]
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            read.append(len(texts))
            encoded: list[list[int]] = super().encode(texts)
            return encoded

    files = [Document(f"{g} {n}", _text(f"g{g}n{n}x", 400), group=str(g)) for g in range(6) for n in range(600)]
    parts = divide_text(files, Counting(), BUDGETS, length=100)
    assert parts["search"].division is not None
    assert parts["search"].division.apart
    assert {name: text.tokens for name, text in parts.items()} == BUDGETS
    assert sum(read) <= 200
    assert all(len(text.groups) >= 2 for text in parts.values())


def _packages(count: int) -> list[Document]:
    return [Document(f"{g} {n}", _text(f"g{g}n{n}x", 60), group=str(g)) for g in range(count) for n in range(60)]


@pytest.mark.parametrize("count", [16, 38, 60])
def test_what_is_fitted_on_has_all_groups_that_checking_and_search_leave(count: int) -> None:
    budgets = {"validation": 4000, "fit": 16_000, "search": 4000}
    parts = divide_text(_packages(count), PLAIN, budgets, length=100)
    assert {name: text.tokens for name, text in parts.items()} == budgets
    groups = {name: set(text.groups) for name, text in parts.items()}
    assert not any(groups[one] & groups[other] for one, other in combinations(groups, 2))
    assert len(groups["fit"]) > 0.4 * count
    assert sum(len(own) for own in groups.values()) >= 0.9 * count
    fit = parts["fit"]
    of_document = np.bincount(fit.document_of_token.ravel())
    of_group = np.bincount([int(source.split()[0]) for source in fit.sources], weights=of_document)
    assert of_group.max() < 2.5 * fit.tokens / len(groups["fit"])


@pytest.mark.parametrize("search", [800, 12_000])
def test_more_search_text_of_few_groups_leaves_what_is_fitted_on_as_it_is(search: int) -> None:
    before = {"validation": 4000, "fit": 16_000}
    first, again = (
        divide_text(_packages(38), PLAIN, {**before, "search": tokens}, length=100) for tokens in (4000, search)
    )
    assert again["search"].tokens == search
    assert all((first[name].sequences == again[name].sequences).all() for name in before)


def test_a_licence_in_every_file_is_in_one_part_only_and_counted() -> None:
    files = [Document(str(n), LICENCE + _text(f"own{n}x", 120), group=str(n // 3)) for n in range(90)]
    parts = divide(files, PLAIN, BUDGETS, length=100, vocabulary=None, seed=0)
    holding = [one for part in parts.values() for one in part.documents if "licence5 " in one.text]
    assert len(holding) == 1
    assert parts["fit"].division.removed == pytest.approx(0.5, abs=0.03)
    alone = divide(files, PLAIN, {"search": 2000}, length=100, vocabulary=None, seed=0)["search"]
    assert all("licence5 " in one.text for one in alone.documents)
    assert alone.division.removed == 0


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 12), min_size=1, max_size=70),
    shared=st.lists(st.integers(0, 3), min_size=70, max_size=70),
    fit=st.integers(500, 30_000),
    search=st.integers(500, 4000),
    seed=st.integers(0, 5),
)
def test_no_group_and_no_window_is_in_two_parts(
    groups: list[int], shared: list[int], fit: int, search: int, seed: int
) -> None:
    files = [
        Document(str(n), _text(f"block{shared[n]}x", 60) + _text(f"own{n}x", 80), group=str(group))
        for n, group in enumerate(groups)
    ]
    budgets = {"fit": fit, "search": search}
    try:
        parts = divide(files, PLAIN, budgets, length=100, vocabulary=None, seed=seed)
    except BadDataError:
        assert len(groups) < 3
        return
    (apart,) = {part.division.apart for part in parts.values()}
    assert apart or len(set(groups)) < 4
    for one, other in combinations(parts.values(), 2):
        names = [{document.group for document in part.documents} for part in (one, other)]
        assert not apart or not names[0] & names[1]
        origins = [{document.digest for document in part.documents} for part in (one, other)]
        assert not origins[0] & origins[1]
        found = [set().union(*(windows(document.text) for document in part.documents)) for part in (one, other)]
        assert not found[0] & found[1]
    renamed = [Document(f"x{file.source}", file.text, group=f"x{file.group}") for file in reversed(files)]
    again = divide(renamed, PLAIN, budgets, length=100, vocabulary=None, seed=seed)
    assert {name: [one.text for one in part.documents] for name, part in again.items()} == {
        name: [one.text for one in part.documents] for name, part in parts.items()
    }
