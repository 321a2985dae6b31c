"""Whole runs on architectures without an entry of their own, each as teacher and as student."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_svd_distill.adapter.verify import verify
from moe_svd_distill.pipeline.distill import distill
from moe_svd_distill.pipeline.pair import open_model
from moe_svd_distill.recipe import recipe_yaml
from tests.support import architectures
from tests.support.heads import TRAINED, with_tokenizer
from tests.support.pairs import recipe_for

TYPES = (
    *("qwen2", "qwen3_5_moe", "gemma4_text#moe", "gemma4", "glm_moe_dsa", "deepseek_v4", "gpt_oss", "nemotron_h"),
    *("kimi_k25", "llama4", "mistral3"),
)
QUICK = ("gpt_oss", "deepseek_v4")
SHORT: dict[str, Any] = {"tokens": 1024, "scale_search_tokens": 1024, "sequence_tokens": 64}
STAGES: dict[str, dict[str, Any]] = {
    "weights": {"method": "weights", "rank": 4},
    "calibrated": TRAINED | SHORT | {"method": "calibrated", "start": "auto", "last_layers": 2, "fit_passes": 2},
    "refined": TRAINED | SHORT,
}
STEPS = {"calibrated": "fitting the head and the last layers", "refined": "training"}
SIX = ("llama", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss")


def _marked(name: str) -> Any:
    marks = [pytest.mark.all_types, *([] if name in QUICK else [pytest.mark.soak])]
    return pytest.param(name, marks=marks)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Callable[[str, int], Path]:
    """A tiny model of a type with the tokenizer's vocabulary, made once."""
    folder = tmp_path_factory.mktemp("types")
    size = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])

    @cache
    def made(name: str, seed: int) -> Path:
        place = folder / f"{name.replace('#', '-')}-{seed}"
        return with_tokenizer(architectures.saved(name, place, seed, vocab_size=size), tokenizer)

    return made


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("model_type", [_marked(name) for name in TYPES])
def test_every_stage_runs_with_it(
    model_type: str, role: str, stage: str, model: Callable[[str, int], Path], tmp_path: Path
) -> None:
    teacher, student = (model_type, "llama") if role == "teacher" else ("llama", model_type)
    recipe = recipe_for(model(teacher, 1), model(student, 2), tmp_path / "out", **STAGES[stage])
    adapter = distill(recipe)
    report = verify(tmp_path / "out", recipe.student)
    assert report.load is not None
    assert report.digest_checked
    rows = adapter.record.content["tensors"]
    assert all(row["fate"] == "lora" or row["reason"] for row in rows)
    stored = {name.partition("[")[0] for name in (row["name"] for row in rows)}
    ignored = set(adapter.record.content["ignored_student_tensors"])
    assert set(open_model(recipe.student).checkpoint) <= stored | ignored | _parts(rows)
    if stage == "refined":
        curve = adapter.record.content["refinement"]["curve"]
        assert min(point["kl"] for point in curve) < 0.9 * curve[0]["kl"]
    if stage == "calibrated":
        kl = adapter.record.content["calibration"]["kl_by_pass"]
        assert min(kl) < 0.9 * kl[0]


def _parts(rows: list[dict[str, Any]]) -> set[str]:
    """Stored tensors of which only parts have a row of their own, such as ``….qkv_proj.weight.q``."""
    return {row["name"].rpartition(".")[0] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STEPS)
@pytest.mark.parametrize("model_type", [_marked(name) for name in TYPES])
def test_a_killed_run_ends_in_the_same_bytes(
    model_type: str, stage: str, model: Callable[[str, int], Path], tmp_path: Path
) -> None:
    values = STAGES[stage]
    pair = (model("llama", 1), model(model_type, 2))
    whole = distill(recipe_for(*pair, tmp_path / "whole", **values))
    recipe = recipe_for(*pair, tmp_path / "killed", **values)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    command = [sys.executable, "-m", "tests.support.killed", str(tmp_path / "recipe.yaml"), STEPS[stage], "0.4"]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = distill(recipe)
    assert again.sha256 == whole.sha256


@pytest.mark.slow
@pytest.mark.parametrize(
    "student",
    [
        _marked(name) if name == "gpt_oss" else pytest.param(name, marks=[pytest.mark.all_types, pytest.mark.soak])
        for name in SIX
    ],
)
@pytest.mark.parametrize("teacher", SIX)
def test_the_weights_stage_makes_an_adapter_that_loads(
    teacher: str, student: str, model: Callable[[str, int], Path], tmp_path: Path
) -> None:
    recipe = recipe_for(model(teacher, 1), model(student, 2), tmp_path / "out", method="weights", rank=4)
    adapter = distill(recipe)
    report = verify(tmp_path / "out", recipe.student)
    assert report.load is not None
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == report.load.keys
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    changed = [row for row in adapter.record.content["tensors"] if row["fate"] == "lora"]
    assert changed
    assert all(row["fate"] == "lora" or row["reason"] for row in adapter.record.content["tensors"])
