"""Putting an adapter together from parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.scale_search import ScaleDecision
from moe_svd_distill.execution.parts import write_part
from moe_svd_distill.execution.publish import OutputFolder
from moe_svd_distill.pipeline.assembly import AdapterChange, stage_adapter
from moe_svd_distill.pipeline.pair import open_pair
from tests.support.models import saved
from tests.support.pairs import recipe_for


def test_a_pair_that_no_key_can_hold_stops_the_assembly(tmp_path: Path) -> None:
    teacher, student = saved("llama", tmp_path / "t", seed=1), saved("llama", tmp_path / "s", seed=2)
    recipe = recipe_for(teacher, student, tmp_path / "out", rank=2)
    name = "model.layers.0.input_layernorm.weight"
    tensors = {f"{name}#A": torch.ones(1, 4), f"{name}#B": torch.ones(4, 1)}
    with open_pair(recipe.teacher, recipe.student) as pair, OutputFolder(tmp_path / "out") as output:
        change = AdapterChange(
            [write_part(tmp_path, "0" * 32, tensors, {"label": "x", "layer": 0})], ScaleDecision({}, None, "")
        )
        with pytest.raises(BadDataError, match="input_layernorm"):
            stage_adapter(output, recipe, pair, change)
