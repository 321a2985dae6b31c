"""A value that is no number is named where it is read: model, tensor and count, wherever in the model it lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.streaming import load_head, stream_states
from tests.streaming.conftest import Case

IDS = np.arange(24).reshape(2, 12)


def broken(case: Case, folder: Path, name: str, value: float) -> Checkpoint:
    """The model with two such values in one stored tensor."""
    shutil.copytree(case.folder, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(folder / index[name])
    tensors[name].view(-1)[1] = tensors[name].view(-1)[3] = value
    save_file(tensors, folder / index[name], metadata={"format": "pt"})
    found = open_checkpoint(folder)
    found.role = "teacher"
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama", "model.norm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.layers.1.self_attn.q_proj.bias"),
        ("llama", "model.layers.2.mlp.down_proj.weight"),
        ("qwen3_moe", "model.layers.2.mlp.experts.3.up_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
        ("glm4_moe", "model.layers.2.mlp.gate.e_score_correction_bias"),
    ],
)
def test_in_the_decoder(model: str, name: str, value: float, make_case: Callable[[str], Case], tmp_path: Path) -> None:
    checkpoint = broken(make_case(model), tmp_path / "m", name, value)
    with pytest.raises(BadDataError, match="NaN or Inf") as caught:
        stream_states(checkpoint, IDS, tmp_path / "cache")
    assert caught.value.what.startswith(f"teacher {checkpoint.folder}: {name} holds 2 NaN or Inf of ")
    assert all(".layer-" in path.name for path in (tmp_path / "cache").glob("states-*")), "there are no final states"


def test_in_the_head(make_case: Callable[[str], Case], tmp_path: Path) -> None:
    checkpoint = broken(make_case("qwen3"), tmp_path / "m", "lm_head.weight", float("nan"))
    with pytest.raises(BadDataError, match=r"^teacher .*: lm_head.weight holds 2 NaN or Inf of 2048 entries"):
        load_head(checkpoint)


def test_values_beyond_the_type_that_is_computed_in(make_case: Callable[[str], Case], tmp_path: Path) -> None:
    checkpoint = broken(make_case("qwen3"), tmp_path / "m", "lm_head.weight", 1e30)
    assert bool(torch.isfinite(load_head(checkpoint).weight).all())
    with pytest.raises(BadDataError, match=r"lm_head.weight has values that torch.float16 does not reach"):
        load_head(checkpoint, dtype=torch.float16)


def test_rows_of_tokens_that_are_not_read_do_not_matter(make_case: Callable[[str], Case], tmp_path: Path) -> None:
    case = make_case("llama")
    checkpoint = broken(case, tmp_path / "m", "model.embed_tokens.weight", float("nan"))
    with (
        stream_states(checkpoint, IDS + 1, tmp_path / "a") as mine,
        stream_states(case.checkpoint, IDS + 1, tmp_path / "b") as theirs,
    ):
        assert torch.equal(mine.rows(slice(None)), theirs.rows(slice(None)))
