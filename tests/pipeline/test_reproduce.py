"""Running a recipe again and comparing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.cli.main import main
from moe_svd_distill.errors import BadDataError, CannotWriteError, MissingInputError
from moe_svd_distill.files.typed import read_as
from moe_svd_distill.pipeline import reproduce as module
from moe_svd_distill.pipeline.distill import distill
from moe_svd_distill.pipeline.evaluate import EvaluatedAdapter
from moe_svd_distill.pipeline.reproduce import Compared, reproduce
from moe_svd_distill.report.record import EvaluationRecord
from tests.support.models import saved
from tests.support.pairs import recipe_for
from tests.support.run_records import figures


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    teacher, student = saved("llama", folder / "t", seed=1), saved("llama", folder / "s", seed=2)
    return distill(recipe_for(teacher, student, folder / "out", rank=4, head_rank=8)).folder


def changed(out: Path, tmp_path: Path, **changes: object) -> Path:
    """The adapter with another run.json."""
    copy = tmp_path / "changed"
    copy.mkdir()
    (copy / "run.json").write_text(json.dumps({**json.loads((out / "run.json").read_text()), **changes}))
    return copy


def test_the_same_bytes_come_out_beside_it(out: Path) -> None:
    found = reproduce(out)
    assert found.folder == out.with_name("out-reproduced")
    assert found.sha256.same
    assert found.reproduced
    assert found.environment == ()
    assert all(figure.same for figure in found.figures)


def test_what_another_run_has_left_does_not_confirm_itself(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    with pytest.raises(CannotWriteError, match="is not empty"):
        reproduce(out, copy)
    tried = reproduce(out, tmp_path / "tried")
    assert tried.reproduced
    assert reproduce(out, tmp_path / "tried").reproduced


def test_what_differs_of_the_environment_and_of_the_figures_is_named(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = json.loads((out / "run.json").read_text())
    versions = run["versions"] | {"torch": "1.0"}
    summary = run["summary"] | {"fates": {"lora": 1000}}
    other = changed(out, tmp_path, versions=versions, summary=summary, adapter_sha256="ab" * 32)
    with pytest.raises(SystemExit) as left:
        main(["reproduce", str(other), "--output", str(tmp_path / "again"), "--quiet"])
    assert left.value.code == 65
    said = " ".join(capsys.readouterr().out.split())
    assert "torch 1.0 →" in said
    assert "matrices lora 1000 →" in said
    assert "not evaluated on held-out text" in said
    assert "Not reproduced" in said
    with pytest.raises(SystemExit) as left:
        main(["reproduce", str(other), "--output", str(tmp_path / "again"), "--json", "--quiet"])
    assert left.value.code == 65
    assert json.loads(capsys.readouterr().out)["same_bytes"] is False


def test_other_bytes_with_the_same_figures_are_reproduced(out: Path, tmp_path: Path) -> None:
    found = reproduce(changed(out, tmp_path, adapter_sha256="ab" * 32), tmp_path / "again")
    assert not found.sha256.same
    assert found.reproduced


def test_another_model_is_refused_before_any_work(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "distill", lambda *_: pytest.fail("began"))
    other = saved("llama", tmp_path / "other", seed=3)
    with pytest.raises(BadDataError, match="other weights than the one"):
        reproduce(out, tmp_path / "again", teacher=str(other))
    with pytest.raises(CannotWriteError, match="to be reproduced"):
        reproduce(out, out)
    with pytest.raises(MissingInputError, match="no recipe"):
        reproduce(changed(out, tmp_path, recipe=None), tmp_path / "again")
    with pytest.raises(MissingInputError, match="no finished adapter"):
        reproduce(other)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (1.0, 1.009, True),
        (1.0, 1.02, False),
        ("a", "a", True),
        (None, 1.0, False),
        (0.0, 0.0, True),
        (True, False, False),
        (float("nan"), float("nan"), True),
        (float("nan"), 1.0, False),
    ],
)
def test_figures_are_the_same_within_a_hundredth(before: object, now: object, same: bool) -> None:
    assert Compared("x", before, now).same is same


@pytest.mark.parametrize("there", [True, False])
def test_held_out_figures_are_measured_again_where_the_text_is_still_there(
    there: bool, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = changed(out, tmp_path, adapter_sha256="ab" * 32)
    text = tmp_path / "text.txt"
    if there:
        text.write_text("words")
    earlier = {"adapter_sha256": "ab" * 32, "effect": "helps", "adapted": figures(0.3, 4.2), "texts": [str(text)]}
    earlier["asked"] = {"tokens": 1024, "seed": 3, "controls": 0}
    (first / "evaluation.json").write_text(json.dumps(earlier))
    asked: list[dict[str, Any]] = []

    def measured(folder: Path, texts: Any, on_progress: object, **options: Any) -> EvaluatedAdapter:
        asked.append(options)
        return EvaluatedAdapter(read_as(EvaluationRecord, {"effect": "helps", "adapted": figures(0.4, 4.2)}), None)

    monkeypatch.setattr(module, "evaluate", measured)
    found = reproduce(first, tmp_path / "again")
    assert found.reproduced is not there
    if there:
        assert asked[0].items() >= {"tokens": 1024, "seed": 3, "controls": 0}.items()
        assert [each.name for each in found.figures if not each.same] == ["held out: kl"]
    else:
        assert "text.txt is not there" in found.notes[0]
