"""Every tensor of every family has a meaning, and headers that contradict config.json are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families import Carrier, read_layout
from moe_svd_distill.families.registry import families, family_of
from moe_svd_distill.pipeline.pair import open_model
from tests.support.models import configuration, saved

FAMILIES = sorted(families())


def test_the_families_of_the_first_version_are_there() -> None:
    assert FAMILIES == ["glm4_moe", "llama", "mixtral", "qwen3", "qwen3_moe"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_of_a_real_model_is_known_and_sizes_come_from_its_config(model_type: str, tmp_path: Path) -> None:
    model = open_model(str(saved(model_type, tmp_path / "m")))
    config = configuration(model_type)
    assert set(model.layout.meanings) == set(model.checkpoint)
    assert not model.layout.unknown
    geometry = model.layout.geometry
    assert (geometry.layers, geometry.hidden, geometry.vocabulary) == (2, 32, 96)
    assert geometry.query_heads == config.num_attention_heads
    moe = model_type in ("qwen3_moe", "mixtral", "glm4_moe")
    assert geometry.experts == (4 if moe else 0)
    assert model.layout.experts_at(1) == (4 if moe else 0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_everything_with_two_dimensions_can_be_carried(model_type: str) -> None:
    for role in families()[model_type].roles:
        assert (role.carrier is not Carrier.NONE) == (len(role.axes) == 2), role.role
        assert (role.target != "") == (role.carrier is not Carrier.NONE), role.role


def test_layers_that_are_dense_in_a_mixture_of_experts(tmp_path: Path) -> None:
    qwen = open_model(str(saved("qwen3_moe", tmp_path / "q", mlp_only_layers=[0])))
    assert (qwen.layout.experts_at(0), qwen.layout.experts_at(1)) == (0, 4)
    glm = open_model(str(saved("glm4_moe", tmp_path / "g")))
    assert glm.layout.find("dense.gate", 0)
    assert glm.layout.find("shared.gate", 1)
    assert glm.layout.find("router.correction_bias", 1)


def test_a_prediction_layer_after_the_last_one_is_ignored_with_a_reason(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("glm4_moe", tmp_path / "g"))
    shapes = {name: info.shape for name, info in checkpoint.items()}
    shapes["model.layers.2.self_attn.q_proj.weight"] = (32, 32)
    shapes["model.layers.2.eh_proj.weight"] = (32, 64)
    layout = read_layout(families()["glm4_moe"], checkpoint.config, shapes)
    assert set(layout.ignored) == {"model.layers.2.self_attn.q_proj.weight", "model.layers.2.eh_proj.weight"}
    assert all("multi-token prediction" in reason for reason in layout.ignored.values())


def test_tied_heads_are_ignored_even_where_they_are_stored(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("llama", tmp_path / "l"))
    shapes = {name: info.shape for name, info in checkpoint.items()}
    layout = read_layout(families()["llama"], checkpoint.config | {"tie_word_embeddings": True}, shapes)
    assert list(layout.ignored) == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("remove", "change", "words"),
    [
        ("model.layers.0.self_attn.q_proj.weight", {}, "is missing"),
        ("model.layers.1.mlp.experts.2.up_proj.weight", {}, "experts.2.up_proj.weight is missing"),
        ("model.layers.1.mlp.gate.weight", {}, "mlp.gate.weight is missing"),
        ("lm_head.weight", {}, "does not tie"),
        (None, {"hidden_size": 64}, "×64 from config.json"),
        (None, {"num_experts": 3}, "expected 3×32"),
        (None, {"num_hidden_layers": "two"}, "expected a positive integer"),
    ],
)
def test_contradictions_are_one_line(remove: str | None, change: dict[str, object], words: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("qwen3_moe", tmp_path / "q"))
    config = {key: value for key, value in checkpoint.config.items() if key != "num_local_experts"}
    config = {**config, "num_experts": 4, **change}
    shapes = {name: info.shape for name, info in checkpoint.items() if name != remove}
    with pytest.raises(BadDataError) as caught:
        read_layout(families()["qwen3_moe"], config, shapes)
    assert words in str(caught.value)


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(BadDataError, match="the nearest is qwen3_moe") as caught:
        family_of({"model_type": "qwen3_mo"}, "somewhere")
    assert "glm4_moe" in str(caught.value)
