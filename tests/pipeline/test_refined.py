"""The refined stage on real files: what is written, how it resumes, where it runs, and what it starts from."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.merge import merge
from moe_svd_distill.adapter.verify import verify
from moe_svd_distill.errors import MissingInputError, UsageError
from moe_svd_distill.execution.events import Event, StageReached
from moe_svd_distill.pipeline.distill import distill, load_adapter
from moe_svd_distill.pipeline.pair import open_model
from moe_svd_distill.recipe import Recipe, recipe_yaml
from tests.support.events import notes_to
from tests.support.heads import TRAINED
from tests.support.models import load
from tests.support.pairs import recipe_for


def _with_training(**values: Any) -> dict[str, Any]:
    return TRAINED | {"training": {**TRAINED["training"], **values}}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    out = tmp_path_factory.mktemp("refined") / "out"
    recipe = recipe_for(*tiny, out, **TRAINED)
    distill(recipe)
    return recipe, out


def test_every_matrix_of_the_layers_and_the_head_is_trained(finished: tuple[Recipe, Path]) -> None:
    recipe, out = finished
    record = load_adapter(out).record.content
    assert verify(out).digest_checked
    facts = record["refinement"]
    changed = {row["name"]: row for row in record["tensors"] if row["fate"] == "lora"}
    assert sorted(row["name"] for row in record["tensors"]) == sorted(open_model(recipe.student).checkpoint)
    assert {row["layer"] for row in changed.values()} == {0, 1, None}
    assert len(changed) == 1 + facts["matrices"]
    assert all(row["stage"] == "refined" for row in changed.values())
    assert record["method_choice"]["stages"] == ["refined"]
    assert record["transferred"]
    curve = facts["curve"]
    assert curve[facts["best"]]["kl"] == min(point["kl"] for point in curve) < 0.8 * curve[0]["kl"]
    assert json.loads((out / "training_curve.json").read_text())["curve"] == curve


def test_merged_and_unmerged_say_the_same(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    recipe, out = finished
    ids = torch.randint(0, 380, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = load(Path(recipe.student))(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(load(Path(recipe.student)), str(out))(input_ids=ids).logits
        merge(out, recipe.student, tmp_path / "merged")
        merged = load(tmp_path / "merged")(input_ids=ids).logits
    assert float((adapted - before).abs().max()) > 0.1
    torch.testing.assert_close(merged, adapted, rtol=0, atol=2e-3)


def test_the_same_run_again_trains_nothing(finished: tuple[Recipe, Path]) -> None:
    recipe, out = finished
    before = load_adapter(out)
    again = distill(recipe)
    assert again.sha256 == before.sha256
    assert again.record.content["refinement"]["resumed_at_step"] == again.record.content["refinement"]["steps"]


def test_more_search_text_trains_nothing(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, out = finished
    shutil.copytree(out, tmp_path / "out")
    more = recipe.model_copy(update={"output": tmp_path / "out", "scale_search_tokens": 4096})
    record = distill(more).record.content
    assert record["calibration"]["text"]["search"]["tokens"] == 4096
    assert record["refinement"]["resumed_at_step"] == record["refinement"]["steps"]
    computed = {name for name, passed in record["refinement"]["streamed"].items() if passed["layers_computed"]}
    assert computed == {"teacher, search text"}


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.2, 0.7])
def test_a_killed_run_ends_in_the_same_bytes(finished: tuple[Recipe, Path], tmp_path: Path, fraction: float) -> None:
    recipe, out = finished
    other = recipe.model_copy(update={"output": tmp_path / "out"})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_yaml(other))
    command = [sys.executable, "-m", "tests.support.killed", str(file), "training", str(fraction)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "out" / "run.json").exists()
    assert distill(other).sha256 == load_adapter(out).sha256


@pytest.mark.slow
def test_streamed_training_gives_what_resident_training_gives(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, _ = finished
    values = _with_training(placement="streamed") | {"dtype": "float32"}
    streamed = distill(recipe_for(Path(recipe.teacher), Path(recipe.student), tmp_path / "streamed", **values))
    values = _with_training(placement="resident") | {"dtype": "float32"}
    resident = distill(recipe_for(Path(recipe.teacher), Path(recipe.student), tmp_path / "resident", **values))
    assert streamed.record.content["refinement"]["placement"]["resident"] is False
    for mine, theirs in zip(
        streamed.record.content["refinement"]["curve"], resident.record.content["refinement"]["curve"], strict=True
    ):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-3)


@pytest.mark.slow
def test_training_goes_on_from_an_earlier_adapter_at_a_higher_rank(
    finished: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, out = finished
    first = load_adapter(out).record.content["refinement"]
    values = TRAINED | {"start": str(out), "rank": 6}
    adapter = distill(recipe_for(Path(recipe.teacher), Path(recipe.student), tmp_path / "out", **values))
    facts = adapter.record.content["refinement"]
    assert facts["start_pairs"] == first["matrices"]
    assert facts["curve"][0]["kl"] == pytest.approx(first["curve"][first["best"]]["kl"], rel=2e-2)
    assert facts["curve"][facts["best"]]["kl"] <= facts["curve"][0]["kl"]
    pairs = LowRankPairs(adapter.folder, open_model(recipe.student).architecture)
    ranks = {pairs.rank(name) for name in pairs if "layers" in name}
    assert ranks == {6}
    with pytest.raises(UsageError, match="has rank 4"):
        distill(recipe_for(Path(recipe.teacher), Path(recipe.student), tmp_path / "low", **values | {"rank": 3}))


@pytest.mark.slow
def test_stages_before_it_are_the_start(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    values = _with_training(learning_rate="auto") | {"start": "calibrated", "copies": 1, "fit_passes": 2}
    adapter = distill(recipe_for(*tiny, tmp_path / "out", **values))
    record = adapter.record.content
    verify(adapter.folder)
    assert record["method"] == "calibrated+refined"
    facts = record["refinement"]
    assert facts["start_pairs"] == record["calibration"]["last_layers_matrices"]
    assert not facts["rate_trials"]
    assert facts["settings"]["rate"] == pytest.approx(
        0.6 / open_model(adapter.record.content["student"]["source"]).layout.geometry.hidden
    )
    untouched = record["calibration"]["kl_by_pass"][0]
    assert facts["curve"][0]["kl"] < 0.9 * untouched


def test_a_start_that_is_not_there_is_refused(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="holds no adapter"):
        distill(recipe_for(*tiny, tmp_path / "out", **TRAINED | {"start": str(tmp_path)}))


def test_with_a_large_vocabulary_and_little_text_the_head_stands_still(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """method calibrated hands over to training all layers; the adapter holds no head, and PEFT loads it."""
    notes: list[str] = []
    values = TRAINED | {
        "method": "calibrated",
        "start": "auto",
        "training": {"head": "auto", "epochs": 2},
        "last_layers": 2,
        "tokens": 512,
    }
    recipe = recipe_for(*tiny, tmp_path / "out", **values)
    events: list[Event] = []
    adapter = distill(recipe, events.append)
    for event in events:
        notes_to(notes)(event)
    record, head = adapter.record.content, open_model(recipe.student).architecture.head
    assert record["method"] == "refined"
    for searching in (
        "working out what the scale search needs of the teacher",
        "searching the scale of what was trained",
    ):
        shares = [event.fraction for event in events if isinstance(event, StageReached) and event.name == searching]
        assert shares == sorted(shares), searching
        assert len(shares) > 1, searching
    assert "the head stands still" in record["method_choice"]["reason"]
    assert any("the head stands still" in note for note in notes)
    assert any("; last_layers is of the fit alone and not used" in note for note in notes)
    facts = record["refinement"]
    assert facts["head"] == "fixed"
    assert facts["settings"]["head"] == "fixed"
    assert facts["copies_of_the_text"] == facts["own_text_sequences"] == 0
    assert not any(name.startswith(f"base_model.model.{head}") for name in _tensors(tmp_path / "out"))
    (row,) = (row for row in record["tensors"] if row["name"] == head)
    assert row["fate"] == "kept"
    assert row["reason"].startswith("the head stands still")
    assert verify(tmp_path / "out").digest_checked
