"""Pairs of tiny models on disk, and units done in this process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from moe_svd_distill.pairing.unit import UnitOfWork
from moe_svd_distill.pipeline.pair import open_model, open_pair
from moe_svd_distill.pipeline.placement import execution_settings
from moe_svd_distill.pipeline.units import make_work, prepare
from moe_svd_distill.recipe import Recipe, parse_recipe
from tests.support import architectures
from tests.support.heads import TEXT
from tests.support.models import save, saved
from tests.support.planted import Planted, plant

LITTLE_TEXT: dict[str, Any] = {
    "calibration": [str(TEXT)],
    "method": "refined",
    "start": "zero",
    "tokens": 1600,
    "scale_search_tokens": 1100,
    "copies": 0,
}
"""Of a recipe that trains for seconds."""

FAMILIES = ("glm4_moe", "llama", "mixtral", "qwen3", "qwen3_moe")  # with a tiny form in `models`


def recipe_for(teacher: Path, student: Path, output: Path, **values: Any) -> Recipe:
    """A recipe for one CPU worker: the weights alone without text; with it, the head is trained however short it is."""
    method = "auto" if values.get("calibration") else "weights"
    base = {"teacher": str(teacher), "student": str(student), "output": str(output), "method": method}
    training = {"head": "train", **values.pop("training", {})}
    return parse_recipe({**base, "devices": ["cpu"], "workers": 1, "training": training, **values})


def planted_pair(
    model_type: str, folder: Path, *, noise: float = 0.01, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Path, Path, Planted]:
    """A teacher and the student planted from it.

    Returns:
        Folder of the teacher, folder of the student, and what was done.
    """
    if model_type in FAMILIES:
        teacher = saved(model_type, folder / "teacher", seed=1, dtype=dtype, **changes)
    else:
        teacher = save(architectures.build(model_type, 1, **changes), folder / "teacher", dtype)
    model = open_model(str(teacher))
    planted = plant(model.layout, {name: model.checkpoint.read(name).clone() for name in model.checkpoint}, noise=noise)
    return teacher, with_tensors(teacher, folder / "student", planted.tensors), planted


def with_tensors(like: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of a single-file model with other tensors."""
    shutil.copytree(like, folder)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Content(NamedTuple):
    """What a unit of work has given."""

    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]


def run_units(recipe: Recipe) -> list[tuple[UnitOfWork, Content]]:
    """Every unit of a recipe, done in this process."""
    with open_pair(recipe.teacher, recipe.student) as pair:
        plan = prepare(recipe, pair, execution_settings(recipe))
        work = make_work(recipe, pair)
        return [(unit, Content(*work(unit, "cpu"))) for unit in plan.units]


def records(contents: list[tuple[UnitOfWork, Content]]) -> dict[str, dict[str, Any]]:
    """Hub name to record."""
    return {row["name"]: row for _, content in contents for row in content.record["tensors"]}


def delta(contents: list[tuple[UnitOfWork, Content]], name: str) -> torch.Tensor:
    """B·A of a tensor, float32."""
    tensors = {key: tensor for _, content in contents for key, tensor in content.tensors.items()}
    return tensors[f"{name}#B"].float() @ tensors[f"{name}#A"].float()
