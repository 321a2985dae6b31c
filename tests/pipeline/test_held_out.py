"""What of a text an adapter is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_svd_distill.calibration.documents import Document
from moe_svd_distill.evaluation import evaluate
from moe_svd_distill.pipeline.evaluate import evaluate_adapter
from moe_svd_distill.pipeline.held_out import held_out
from moe_svd_distill.report.figures import text_note
from moe_svd_distill.report.record import EvaluationRecord, SearchRecord, read_as
from tests.support.models import saved


def _text(name: str, words: int = 60) -> str:
    return " ".join(f"{name}{n}" for n in range(words))


USED = Document("used", _text("used"), group="a")
SAME = Document("same", _text("same"), group="a")
COPY = Document("copy", _text("used", 50) + " and the end", group="b")
OTHER = Document("other", _text("other"), group="b")
USES = {"used_documents": [USED.digest], "used_groups": [USED.group_digest]}
SEARCH = read_as(SearchRecord, USES)


def test_documents_their_groups_and_what_repeats_them_are_left_out_and_counted() -> None:
    found = held_out([USED, SAME, COPY, OTHER], SEARCH, [USED])
    assert found.documents == (OTHER,)
    assert (found.used, found.of_used_groups, found.repeated, found.apart) == (1, 1, 1, True)


def test_without_the_text_it_was_made_of_repetitions_are_not_known() -> None:
    found = held_out([USED, SAME, COPY, OTHER], SEARCH, [])
    assert found.documents == (COPY, OTHER)
    assert found.as_dict()["documents_repeated"] is None


def test_where_nothing_else_is_left_other_documents_of_the_same_sources_are_read() -> None:
    found = held_out([USED, SAME], SEARCH, [USED])
    assert found.documents == (SAME,)
    assert (found.used, found.of_used_groups, found.apart) == (1, 0, False)


def test_an_adapter_without_a_record_and_text_that_is_all_used() -> None:
    assert held_out([USED, OTHER], read_as(SearchRecord, {}), []).documents == (USED, OTHER)
    assert held_out([USED], SEARCH, []).documents == ()


@pytest.mark.parametrize("same", [False, True])
def test_the_verdict_and_the_note_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    told: list[Any] = []

    def measured(*where: Any, **_: Any) -> Any:
        told.extend(where[3])
        return SimpleNamespace(as_dict=lambda: {"verdict": "It helps.", "student": {"tokens": 7}})

    monkeypatch.setattr(evaluate, "evaluate", measured)
    student = str(saved("llama", tmp_path / "student"))
    rows = [{"text": SAME.text, "site": "a"}, {"text": USED.text, "site": "a"}]
    rows += [] if same else [{"text": OTHER.text, "site": "b"}]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "adapter").mkdir()
    record = {"recipe": {"text_group": "site"}, "scale_search": USES}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(record))
    figures = evaluate_adapter(tmp_path / "adapter", student, student, [tmp_path / "text.jsonl"]).evaluation
    assert [document.text for document in told] == [SAME.text if same else OTHER.text]
    assert figures["held_out"]["groups_apart"] != same
    assert ("larger than on other sources" in figures["verdict"]) == same
    expected = "of the sources it was made on" if same else "1 documents left out that it was made on, 1 of the same"
    assert expected in text_note(read_as(EvaluationRecord, figures))
