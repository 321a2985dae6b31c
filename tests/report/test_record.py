"""Records of runs: read whatever version wrote them, and written as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.report.record import EvaluationRecord, RunRecord, read_as
from tests.support.run_records import code_benchmarks, content, evaluation, refinement


def test_what_is_missing_is_none_or_empty_or_the_default() -> None:
    record = RunRecord.of({"teacher": {"source": "org/t"}, "tensors": [{"fate": "kept"}]})
    assert (record.teacher.source, record.teacher.layers, record.student.source) == ("org/t", None, "")
    assert (record.refinement, record.evaluation, record.transferred) == (None, None, None)
    assert (record.tensors[0].fate, record.tensors[0].rank, record.units, record.fates) == ("kept", None, (), {})
    assert read_as(EvaluationRecord, {"unit": None}).unit == "documents"


@pytest.mark.parametrize("damaged", [None, [], {}, "text", 3])
def test_a_part_of_another_kind_is_no_part(damaged: Any) -> None:
    record = RunRecord.of(dict.fromkeys(("teacher", "recipe", "scale_search", "refinement", "versions"), damaged))
    assert record.refinement is None
    assert (record.teacher.source, record.recipe.seed, record.scale_search.scales, record.versions) == (
        "",
        None,
        {},
        {},
    )


def test_a_value_of_another_type_is_as_good_as_missing() -> None:
    record = RunRecord.of(
        {"method": 3, "adapter_sha256": [], "refinement": {"steps": "many", "best": None, "ended": 1}}
    )
    assert (record.method, record.adapter_sha256) == (None, None)
    assert record.refinement is not None
    assert (record.refinement.steps, record.refinement.best, record.refinement.ended) == (None, None, "")
    assert read_as(EvaluationRecord, {"scores": 3, "unit": []}) == read_as(EvaluationRecord, {})


def test_keys_that_are_not_known_are_passed_over_and_kept() -> None:
    older = content(once="here", refinement=refinement(once="here"))
    record = RunRecord.of(older)
    assert record.content["once"] == "here"
    assert record.refinement is not None
    assert (record.refinement.epochs, record.refinement.devices) == (3.0, ("cpu", "cpu"))


def test_figures_and_benchmarks_are_read_into_their_own_kinds() -> None:
    run = {name: value for name, value in content().items() if name != "evaluation"}
    found = RunRecord.of(run, evaluation() | {"code_benchmarks": code_benchmarks()}).evaluation
    assert found is not None
    assert found.student is not None
    assert found.student.perplexity == evaluation()["student"]["perplexity"]
    (control,) = found.controls
    assert control.gap_closed is not None
    assert control.figures is not None
    assert (control.gap_closed.kl, control.figures.kl, control.figures.kl_interval) == (-14.0, 0.585, None)
    assert found.gap_closed is not None
    assert found.gap_closed.kl_interval is not None
    assert found.gap_closed.kl_interval.high == 35.4
    assert found.code_benchmarks["humaneval"].reasons == {"AssertionError": 90}


def test_what_is_written_is_read_again_and_an_empty_folder_has_no_record(tmp_path: Path) -> None:
    assert RunRecord.in_folder(tmp_path).content == {}
    RunRecord.of(content()).write(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == content()
    assert RunRecord.in_folder(tmp_path) == RunRecord.of(content())
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(BadDataError, match=r"run\.json"):
        RunRecord.in_folder(tmp_path)
