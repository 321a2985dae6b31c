"""What trackers get of real runs: curves that go on after a kill, from one process alone, and evaluated figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.errors import MissingInputError
from moe_svd_distill.pipeline.distill import distill, load_adapter
from moe_svd_distill.pipeline.evaluate import evaluate
from moe_svd_distill.pipeline.plan import make_plan
from moe_svd_distill.pipeline.tracked_figures import evaluation_figures
from moe_svd_distill.recipe import recipe_yaml
from moe_svd_distill.tracking import run
from tests.support.heads import TEXT, TRAINED
from tests.support.pairs import recipe_for
from tests.support.trackers import wandb_replaced


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in in place of wandb, here and in other processes, and the file that it writes to."""
    with wandb_replaced(tmp_path, monkeypatch) as written:
        yield written


def _written(file: Path, what: str) -> list[dict[str, Any]]:
    return [each for each in map(json.loads, file.read_text().splitlines()) if each["what"] == what]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_the_same_run_with_every_point_once(
    stand_in: Path, tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(*tiny, tmp_path / "out", **TRAINED, report_to="wandb")
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    command = [sys.executable, "-m", "tests.support.killed", str(tmp_path / "recipe.yaml"), "training", "0.7"]
    assert subprocess.run(command, timeout=300, check=False).returncode == -signal.SIGKILL
    adapter = distill(recipe)
    first, second = _written(stand_in, "init")
    assert first["id"] == second["id"]
    assert first["process"] != second["process"] == os.getpid()
    points = [each["figures"] for each in _written(stand_in, "log")]
    curve = adapter.record.content["refinement"]["curve"]
    assert [(point["refined/step"], point["refined/kl"]) for point in points] == [(p["step"], p["kl"]) for p in curve]
    assert all(point["refined/loss"] > 0 for point in points[1:])
    figures = {name: value for each in _written(stand_in, "summary") for name, value in each["figures"].items()}
    search = adapter.record.scale_search
    assert figures["scale_search_of_refined/scale_refined"] == search.scales["refined"]
    assert figures["seconds/training"] > 0

    evaluated = evaluate(adapter.folder, [TEXT], tokens=1024, controls=0).evaluation
    assert _written(stand_in, "init")[-1]["id"] == first["id"]
    last = _written(stand_in, "summary")[-1]["figures"]
    assert last["evaluation/adapted_kl"] == evaluated.content["adapted"]["kl"]
    assert last["evaluation/student_kl"] == evaluated.content["student"]["kl"]
    evaluate(adapter.folder, [TEXT], tokens=1024, controls=0, report_to=())
    assert len(_written(stand_in, "init")) == 3


def test_workers_log_nothing(stand_in: Path, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(*tiny, tmp_path / "out", method="weights", report_to=["wandb"])
    distill(recipe.model_copy(update={"workers": 2}))
    everything = [json.loads(line) for line in stand_in.read_text().splitlines()]
    assert {each["process"] for each in everything} == {os.getpid()}
    assert "seconds/weights_stage" in everything[-2]["figures"] | everything[-3]["figures"] | everything[-4]["figures"]


def test_trackers_change_nothing_about_an_adapter(stand_in: Path, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    plain = recipe_for(*tiny, tmp_path / "out", method="weights")
    before = distill(plain).sha256
    told: list[object] = []
    again = distill(plain.model_copy(update={"report_to": ["wandb"]}), told.append)
    assert again.sha256 == before == load_adapter(tmp_path / "out").sha256
    assert not [event for event in told if "replaces" in str(event)]


def test_a_missing_library_is_refused_before_any_work(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    recipe = recipe_for(*tiny, tmp_path / "out", method="weights", report_to=["tensorboard"])
    for refused in (distill, make_plan):
        with pytest.raises(MissingInputError, match=r"pip install 'moe-svd-distill\[tensorboard\]'"):
            refused(recipe)
    assert not (tmp_path / "out").exists()


def test_figures_of_benchmarks_and_gaps() -> None:
    found = {
        "student": {"kl": 1.0, "kl_error": 0.1},
        "gap_closed": {"kl": None, "cross_entropy": 12.5},
        "benchmarks": {"scores": [{"task": "arc", "metric": "acc", "filter": "none", "student": 0.25, "adapted": 0.5}]},
        "code_benchmarks": {
            "humaneval": {"student": {"pass_at_1": 0.1}, "adapted": {"pass_at_1": 0.2}, "teacher": None}
        },
    }
    assert evaluation_figures(found) == {
        "student_kl": 1.0,
        "cross_entropy_gap_closed": 12.5,
        "student_arc_acc_none": 0.25,
        "adapted_arc_acc_none": 0.5,
        "student_humaneval_pass_at_1": 0.1,
        "adapted_humaneval_pass_at_1": 0.2,
    }
