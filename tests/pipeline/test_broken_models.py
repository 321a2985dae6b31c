"""Models that are not sound: said before anything is published, with the model and the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.pipeline.distill import distill
from tests.support.heads import TRAINED
from tests.support.pairs import recipe_for, with_tensors

CALIBRATED = {key: value for key, value in TRAINED.items() if key not in ("start", "training")} | {
    "method": "calibrated"
}


@pytest.mark.parametrize("recipe", [TRAINED, CALIBRATED])
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_nan_outside_the_layers_stops_the_run(
    name: str, side: str, recipe: dict[str, object], tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    models = dict(zip(("teacher", "student"), tiny, strict=True))
    tensors = load_file(models[side] / "model.safetensors")
    tensors[name].view(-1)[5] = float("nan")
    models[side] = with_tensors(models[side], tmp_path / "broken", tensors)
    with pytest.raises(BadDataError, match="NaN or Inf") as caught:
        distill(recipe_for(models["teacher"], models["student"], tmp_path / "out", **recipe))
    assert caught.value.what.startswith(f"{side} {models[side]}: {name} holds 1 NaN or Inf of ")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_buffers_in_a_students_file_are_left_out_and_recorded(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = tiny
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    tensors = load_file(student / "model.safetensors") | extra
    found = distill(recipe_for(teacher, with_tensors(student, tmp_path / "s", tensors), tmp_path / "out", **TRAINED))
    assert dict(found.record.ignored_student_tensors) == dict.fromkeys(
        extra, "recomputed from config.json by every loader"
    )
