"""The cost of training is stated before it starts, and is what it then takes."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.errors import MissingInputError
from moe_svd_distill.files.names import ADAPTER_FILE
from moe_svd_distill.pipeline.cost import costs_of_training, operations, readable
from moe_svd_distill.pipeline.distill import distill
from moe_svd_distill.pipeline.pair import open_model, open_pair
from moe_svd_distill.pipeline.plan import make_plan
from tests.support.heads import student_with_tokenizer, teacher_with_other_head, trained_tokenizer
from tests.support.models import saved
from tests.support.pairs import LITTLE_TEXT, recipe_for

CHECKS = 2
"""Of twelve that may be made: measuring 1,024 tokens takes an eighth of the time of training on 6,144 then."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher and a student that differ in their heads, for sequences of 128 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = trained_tokenizer(folder / "tokenizer", 400)
    student = student_with_tokenizer("qwen3_moe", folder / "student", tokenizer)
    return teacher_with_other_head(student, folder / "teacher"), student


def outlook_of(tiny: tuple[Path, Path], output: Path, **values: Any) -> dict[str, Any]:
    """What is planned, which is plain JSON."""
    outlook = make_plan(recipe_for(*tiny, output, **(LITTLE_TEXT | values))).as_dict()
    return dict(json.loads(json.dumps(outlook)))


def rows(outlook: dict[str, Any]) -> dict[str, str]:
    """The rows on the refined stage."""
    return {name.removeprefix("refined stage: "): value for name, value in outlook["sizes"] if "refined" in name}


def test_what_is_planned_is_what_happens(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    values = {"copies": 2, "training": {"epochs": 1.75, "step_tokens": 600, "learning_rate": 0.01}}
    cost = outlook_of(tiny, tmp_path / "plan", **values)["refined"]
    out = tmp_path / "out"
    record = distill(recipe_for(*tiny, out, **(LITTLE_TEXT | values))).record.content
    refined, last = record["refinement"], record["refinement"]["curve"][-1]
    assert cost["steps"] == refined["steps"] == last["step"]
    assert (cost["trained_tokens"], cost["step_tokens"]) == (last["tokens"], last["tokens"] / last["step"])
    measured_on = sum(record["calibration"]["text"][name]["tokens"] for name in ("check", "search"))
    assert cost["teacher_tokens"] == refined["trained_on_tokens"] + measured_on
    assert (cost["resident"], cost["placement"]) == (refined["placement"]["resident"], refined["placement"]["reason"])
    kept = sum(file.stat().st_size for file in (out / "cache").rglob("*") if file.is_file())
    assert 0 <= kept - cost["states_bytes"] < 0.1 * kept
    written = (out / ADAPTER_FILE).stat().st_size
    assert 0 <= written - cost["adapter_bytes"] < 0.2 * written


@pytest.mark.parametrize("last_layers", [0, 1])
def test_what_is_planned_of_the_calibrated_stage_is_what_happens(
    tiny: tuple[Path, Path], tmp_path: Path, last_layers: int
) -> None:
    values = {"method": "calibrated", "start": "auto", "copies": 2, "fit_passes": 2, "last_layers": last_layers}
    cost = outlook_of(tiny, tmp_path / "plan", **values)["calibrated"]
    out = tmp_path / "out"
    record = distill(recipe_for(*tiny, out, **(LITTLE_TEXT | values))).record.content
    fitted = record["calibration"]
    measured_on = sum(fitted["text"][name]["tokens"] for name in ("check", "search"))
    for side, planned in (("teacher", "teacher_tokens"), ("student", "read_by_student")):
        passes = [facts for name, facts in fitted["streamed"].items() if name.startswith(side)]
        assert cost[planned] == sum(facts["tokens"] for facts in passes)
    assert cost["student_passes"] == len(passes)
    assert cost["teacher_tokens"] - measured_on == 3 * fitted["text"]["fit"]["tokens"]
    kept = sum(file.stat().st_size for file in (out / "cache").rglob("*") if file.is_file())
    assert abs(kept - cost["states_bytes"]) < 0.1 * kept
    written = (out / ADAPTER_FILE).stat().st_size
    assert written < 1.1 * cost["adapter_bytes"]


def test_the_plan_of_training_from_zero(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    outlook = outlook_of(tiny, tmp_path / "out")
    assert outlook["method"]["stages"] == ["refined"]
    assert not any(name.startswith(("weights", "calibrated")) for name, _ in outlook["sizes"])
    found, cost = rows(outlook), outlook["refined"]
    assert found["tokens read"] == "3,584 (0 copies, 0 of the student's own, checking and search text)"
    assert found["steps"] == "12 of 512 tokens, at most"
    assert found["tokens trained on"] == f"{12 * 512:,}, repeated ones counted again"
    assert found["student"].startswith("in memory: ")
    assert "weights read in each step" not in found
    assert cost["weights_read"] == 2 * open_model(str(tiny[0])).checkpoint.total_bytes
    assert cost["states_bytes"] == 3584 * 32 * 4
    with open_pair(*map(str, tiny)) as pair:
        (body, head), (_, taught) = pair.student.active_parameters, pair.teacher.active_parameters
    measured = 1024 * (1 + CHECKS) + 1024 * 3  # before, at each check; three scales of the search
    assert cost["teacher_operations"] == 2 * body * 3584 + 2 * taught * (12 * 512 + measured)
    assert cost["student_operations"] == 6 * (body + head) * 12 * 512 + 2 * (body + head) * measured


def test_long_trainings_choose_their_rate_by_trials(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """Three short runs where they take no more than a third of the steps, each measured once."""
    tried = outlook_of(tiny, tmp_path / "out", training={"epochs": 96})
    given = outlook_of(tiny, tmp_path / "out", training={"epochs": 96, "learning_rate": 0.01})
    assert rows(tried)["steps"] == "288 of 512 tokens, at most, and 96 or somewhat more to choose the learning rate"
    assert tried["refined"]["trained_tokens"] == (288 + 96) * 512
    assert given["refined"]["trained_tokens"] == 288 * 512


def test_streamed_training_reads_the_student_twice_in_each_step(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    streamed = {"placement": "streamed", "learning_rate": 0.01}
    outlook = outlook_of(tiny, tmp_path / "out", training=streamed)
    cost, resident = outlook["refined"], outlook_of(tiny, tmp_path / "out", training={"learning_rate": 0.01})["refined"]
    once = open_model(str(tiny[1])).checkpoint.total_bytes
    measured = 1 + CHECKS  # the first before training
    assert (cost["step_bytes"], cost["training_bytes"]) == (2 * once, (2 * 12 + measured) * once)
    assert rows(outlook)["student"] == "one layer at a time: asked for"
    assert rows(outlook)["weights read in each step"] == readable(2 * once)
    with open_pair(*map(str, tiny)) as pair:
        body, _ = pair.student.active_parameters
    assert cost["student_operations"] - resident["student_operations"] == 2 * body * cost["trained_tokens"]
    assert cost["teacher_operations"] == resident["teacher_operations"]


def test_where_the_weights_are_not_at_hand_nothing_is_said_of_the_place(
    tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    with open_pair(*map(str, tiny)) as pair:
        recipe = recipe_for(*tiny, tmp_path, **LITTLE_TEXT)
        cost = costs_of_training(recipe, pair, ["refined"], at_hand=False)["refined"]
        assert (cost.resident, cost.placement, cost.step_bytes) == (None, "", 0)
        assert not any(name == "refined stage: student" for name, _ in cost.rows())
        asked = recipe_for(*tiny, tmp_path, **(LITTLE_TEXT | {"training": {"placement": "streamed"}}))
        streamed = costs_of_training(asked, pair, ["refined"], at_hand=False)["refined"]
        assert streamed.step_bytes == 2 * pair.student.checkpoint.total_bytes


def test_a_start_by_stages_comes_before_and_is_fitted_on_less_text(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    values = {"start": "weights+calibrated", "tokens": 40_000, "copies": "auto", "training": {"start_tokens": 1024}}
    outlook = outlook_of(tiny, tmp_path / "out", **values)
    assert outlook["method"]["stages"] == ["weights", "calibrated", "refined"]
    kinds = list(dict.fromkeys(name.partition(" ")[0] for name, _ in outlook["sizes"]))
    assert kinds == ["teacher", "student", "weights", "calibrated", "refined"]
    assert any("(4 copies, 3,072 of the student's own" in value for _, value in outlook["sizes"])
    automatic = outlook_of(tiny, tmp_path / "out", start="auto")["method"]
    assert automatic["stages"] == [*automatic["auto"]["stages"], "refined"]
    assert "calibrated" in automatic["stages"]
    much = outlook_of(tiny, tmp_path / "out", start="auto", tokens=100_000)["method"]
    assert much["stages"] == [stage for stage in automatic["stages"] if stage != "calibrated"]


def test_a_start_that_holds_no_adapter_is_refused_before_any_work(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="holds no adapter"):
        outlook_of(tiny, tmp_path / "out", start=str(tmp_path))
    (tmp_path / ADAPTER_FILE).touch()
    found = outlook_of(tiny, tmp_path / "out", start=str(tmp_path))["method"]
    assert (found["stages"], found["start"]) == (["refined"], str(tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral", "glm4_moe"])
def test_of_the_experts_only_those_a_token_is_sent_to_count(model_type: str, tmp_path: Path) -> None:
    model = open_model(str(saved(model_type, tmp_path / "model")))
    routed = re.compile(r"\.experts\.\d+\.")
    layers = {name: prod(shape) for name, shape in model.shapes.items() if ".layers." in name}
    outside = sum(size for name, size in layers.items() if not routed.search(name))
    inside = sum(size for name, size in layers.items() if routed.search(name))
    assert (inside > 0) == (model_type != "llama")
    assert model.active_parameters == (outside + inside // 2, 96 * 32)  # two of four experts for each token


def test_units() -> None:
    assert [operations(10.0**power) for power in (9, 13, 17, 22)] == [
        "1 GFLOP",
        "10 TFLOP",
        "100 PFLOP",
        "10,000.0 EFLOP",
    ]
    assert [readable(1024**power) for power in (0, 1, 2, 4)] == ["1 B", "1 KiB", "1 MiB", "1,024.0 GiB"]


def test_a_fixed_head_needs_rows_on_the_disk(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    cost = outlook_of(tiny, tmp_path / "fixed", training={"head": "fixed", "epochs": 2})
    tokens = cost["refined"]["teacher_tokens"]
    assert cost["refined"]["rows_bytes"] == 4 * tokens * (open_model(str(tiny[1])).layout.geometry.hidden + 1)
    assert rows(cost)["the teacher's part for the fixed head, while training"]
    without = outlook_of(tiny, tmp_path / "without", training={"head": "train", "epochs": 2})
    assert without["refined"]["rows_bytes"] == 0
    assert "the teacher's part for the fixed head, while training" not in rows(without)
