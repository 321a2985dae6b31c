"""Records of runs: read whatever version wrote them, and written as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.result import Evaluation
from moe_svd_distill.files.typed import read_as
from moe_svd_distill.report.record import LeftOut, RunRecord
from tests.support.run_records import code_benchmarks, content, evaluation, refinement


def test_what_is_missing_is_none_or_empty_or_the_default() -> None:
    record = RunRecord.of({"teacher": {"source": "org/t"}, "tensors": [{"fate": "kept"}]})
    assert (record.teacher.source, record.teacher.layers, record.student.source) == ("org/t", 0, "")
    assert (record.refinement, record.evaluation, record.transferred) == (None, None, None)
    assert (record.tensors, record.units, record.fates) == (({"fate": "kept"},), (), {})
    assert read_as(Evaluation, {"unit": None}).unit == "documents"


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
    assert (record.refinement.steps, record.refinement.best, record.refinement.ended) == (0, None, "")
    assert read_as(LeftOut, {"documents_used": [], "groups_apart": 0, "notes": 3}) == read_as(LeftOut, {})


def test_keys_that_are_not_known_are_passed_over_and_kept() -> None:
    older = content(once="here", refinement=refinement(once="here"))
    record = RunRecord.of(older)
    assert record.content["once"] == "here"
    assert record.refinement is not None
    assert record.refinement.settings is not None
    assert record.refinement.placement is not None
    assert (record.refinement.settings.epochs, record.refinement.placement.devices) == (3.0, ("cpu", "cpu"))


def test_figures_and_benchmarks_are_read_into_their_own_kinds() -> None:
    run = {name: value for name, value in content().items() if name != "evaluation"}
    record = RunRecord.of(run, evaluation() | {"code_benchmarks": code_benchmarks()}).evaluation
    assert record is not None
    found = record.on_text
    assert found is not None
    assert found.student.perplexity == pytest.approx(evaluation()["student"]["perplexity"], rel=1e-3)
    (control,) = found.controls
    assert (control.gap_closed.kl, control.figures.kl, control.figures.kl_interval) == (-14.0, 0.585, None)
    assert found.gap_closed.kl_interval is not None
    assert found.gap_closed.kl_interval.high == 35.4
    assert record.code_benchmarks["humaneval"].adapted.reasons == {"AssertionError": 90}


def test_what_is_written_is_read_again_and_an_empty_folder_has_no_record(tmp_path: Path) -> None:
    assert RunRecord.in_folder(tmp_path).content == {}
    RunRecord.of(content()).write(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == content()
    assert RunRecord.in_folder(tmp_path) == RunRecord.of(content())
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(BadDataError, match=r"run\.json"):
        RunRecord.in_folder(tmp_path)
