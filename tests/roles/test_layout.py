"""Every tensor of a real model has a meaning or a reason, and headers that contradict config.json are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.pipeline.pair import open_model
from moe_svd_distill.roles import ROLES, ModelLayout, TensorView, read_layout
from tests.support import architectures
from tests.support.models import configuration, saved

FAMILIES = ["glm4_moe", "llama", "mixtral", "qwen3", "qwen3_moe"]
# Architectures of which the table knows every tensor.
WHOLE = (
    *("llama", "mistral", "ministral3", "mistral3", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "phi3"),
    *("glm4", "olmo2", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "kimi_k25"),
    *("glm4_moe", "dots1", "ernie4_5", "ernie4_5_moe", "hunyuan_v1_dense", "hunyuan_v1_moe", "minimax_m2", "phimoe"),
    *("granitemoe", "granitemoeshared", "gpt_oss", "llama4", "llama4_text", "mistral4", "qwen3_vl_moe"),
)
# And those whose linear attention has no role.
PARTLY = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "minimax")
FUSED = {
    "phi3": ("model.layers.0.self_attn.qkv_proj.weight", ("attention.q", "attention.k", "attention.v")),
    "glm4": ("model.layers.0.mlp.gate_up_proj.weight", ("dense.gate", "dense.up")),
    "granitemoe": ("model.layers.0.block_sparse_moe.input_linear.weight[3]", ("experts.gate", "experts.up")),
    "gpt_oss": ("model.layers.0.mlp.experts.gate_up_proj[3]", ("experts.gate", "experts.up")),
    "llama4_text": ("model.layers.1.feed_forward.experts.gate_up_proj[3]", ("experts.gate", "experts.up")),
}


def layout_of(folder: Path) -> ModelLayout:
    return open_model(str(folder)).layout


@pytest.mark.parametrize("model_type", [*WHOLE, *PARTLY])
def test_every_tensor_of_a_real_model_has_a_meaning(model_type: str, tmp_path: Path) -> None:
    model = open_model(str(architectures.saved(model_type, tmp_path / "m")))
    layout = model.layout
    placed = {meaning.view.stored for meaning in layout.meanings.values()}
    assert placed | set(layout.ignored) | set(layout.without_role) == set(model.checkpoint)
    assert not any(".layers." in name and "vision" not in name and "visual" not in name for name in layout.ignored)
    assert all("linear attention" in reason for reason in layout.without_role.values())
    assert bool(layout.without_role) == (model_type in PARTLY)
    geometry = layout.geometry
    assert (geometry.layers, geometry.hidden, geometry.vocabulary, geometry.query_heads) == (4, 32, 96, 4)
    for meaning in layout.meanings.values():
        axes = ROLES[meaning.role].axes if meaning.role in ROLES else ()
        assert not axes or len(axes) == len(meaning.shape)
    per_layer = [{m.role for m in layout.meanings.values() if m.layer == layer} for layer in range(4)]
    assert all({"attention.o", "norm.mlp"} <= roles or model_type in (*PARTLY, "olmo2") for roles in per_layer)
    assert all({"dense.down", "experts.down"} & roles for roles in per_layer)


@pytest.mark.parametrize("model_type", sorted(FUSED))
def test_the_parts_of_a_matrix_are_what_transformers_computes_with(model_type: str, tmp_path: Path) -> None:
    """Joined again, they are the matrix; and silu(gate x) · (up x) is what the module puts out."""
    matrix, roles = FUSED[model_type]
    model = open_model(str(architectures.saved(model_type, tmp_path / "m")))
    parts = model.layout.parts_of(matrix)
    assert tuple(model.layout.meanings[view.name].role for view in parts) == roles
    assert [view.name for view in parts] == [f"{matrix}.{role.partition('.')[2]}" for role in roles]
    stored = model.checkpoint.read(parts[0].stored)
    whole = stored if parts[0].expert is None else stored[parts[0].expert]
    whole = whole.mT if parts[0].transposed else whole
    joined = torch.full_like(whole, torch.nan)
    for view in parts:
        joined[view.start :: view.step][: view.rows] = view.within(whole.mT if view.transposed else whole)
    assert torch.equal(joined, whole)


def test_the_order_of_gate_and_up_is_that_of_transformers(tmp_path: Path) -> None:
    for model_type in ("glm4", "granitemoe", "llama4_text", "gpt_oss"):
        folder = architectures.saved(model_type, tmp_path / model_type)
        model, loaded = open_model(str(folder)), architectures.load(folder)
        layer = 1
        experts = model.layout.experts_at(layer) > 0
        prefix = "experts" if experts else "dense"
        views = [
            model.layout.view(f"{prefix}.{side}", layer, 0 if experts else None) for side in ("gate", "up", "down")
        ]
        gate, up, down = (_read(model.checkpoint, view) for view in views)
        x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
        block = loaded.model.layers[layer]
        module: Any = next(m for n, m in block.named_modules() if n.endswith("experts" if experts else "mlp"))
        g, u = x @ gate.mT, x @ up.mT
        if model_type == "gpt_oss":
            g, u = g + module.gate_up_proj_bias[0, 0::2], u + module.gate_up_proj_bias[0, 1::2]
            g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
            expected = ((u + 1) * g * torch.sigmoid(g * 1.702)) @ down.mT + module.down_proj_bias[0]
        else:
            expected = (torch.nn.functional.silu(g) * u) @ down.mT
        with torch.no_grad():
            if not experts:
                found = module(x)
            elif model_type == "llama4_text":
                found = module(x.repeat(4, 1))[:1]
            else:
                found = module(x, torch.tensor([[0]]), torch.ones(1, 1))
        assert torch.allclose(found, expected, atol=1e-5), model_type


def _read(checkpoint: Any, view: TensorView | None) -> torch.Tensor:
    assert view is not None
    stored = checkpoint.read(view.stored)
    return view.within(stored if view.expert is None else stored[view.expert]).float()


@pytest.mark.parametrize(
    ("model_type", "norms"),
    [
        ("llama", {"input_layernorm": "norm.attention", "post_attention_layernorm": "norm.mlp"}),
        (
            "gemma2",
            {
                "input_layernorm": "norm.attention",
                "post_attention_layernorm": "norm.attention_output",
                "pre_feedforward_layernorm": "norm.mlp",
                "post_feedforward_layernorm": "norm.mlp_output",
            },
        ),
        (
            "glm4",
            {
                "input_layernorm": "norm.attention",
                "post_self_attn_layernorm": "norm.attention_output",
                "post_attention_layernorm": "norm.mlp",
                "post_mlp_layernorm": "norm.mlp_output",
            },
        ),
        (
            "olmo2",
            {
                "post_attention_layernorm": "norm.attention_output",
                "post_feedforward_layernorm": "norm.mlp_output",
            },
        ),
    ],
)
def test_norms_before_and_after_a_block_are_told_apart(model_type: str, norms: dict[str, str], tmp_path: Path) -> None:
    layout = layout_of(architectures.saved(model_type, tmp_path / "m"))
    found = {
        name.split(".")[3]: meaning.role
        for name, meaning in layout.meanings.items()
        if meaning.layer == 0 and "layernorm" in name
    }
    assert found == norms
    assert layout.gain_offset == (1.0 if model_type == "gemma2" else 0.0)


def test_layers_that_are_dense_in_a_mixture_of_experts(tmp_path: Path) -> None:
    qwen = layout_of(saved("qwen3_moe", tmp_path / "q", mlp_only_layers=[0]))
    assert (qwen.experts_at(0), qwen.experts_at(1)) == (0, 4)
    glm = layout_of(saved("glm4_moe", tmp_path / "g"))
    assert glm.find("dense.gate", 0)
    assert glm.find("shared.gate", 1)
    assert glm.find("router.correction_bias", 1)


def test_a_prediction_layer_after_the_last_one_is_ignored_with_a_reason(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("glm4_moe", tmp_path / "g"))
    shapes = {name: info.shape for name, info in checkpoint.items()}
    shapes["model.layers.2.self_attn.q_proj.weight"] = (32, 32)
    shapes["model.layers.2.eh_proj.weight"] = (32, 64)
    shapes["mtp.layers.0.eh_proj.weight"] = (32, 64)
    layout = read_layout(checkpoint.config, shapes)
    assert len(layout.ignored) == 3
    assert all("multi-token prediction" in reason for reason in layout.ignored.values())


def test_tied_heads_are_ignored_even_where_they_are_stored(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("llama", tmp_path / "l"))
    shapes = {name: info.shape for name, info in checkpoint.items()}
    assert list(read_layout(checkpoint.config | {"tie_word_embeddings": True}, shapes).ignored) == ["lm_head.weight"]
    config = {key: value for key, value in checkpoint.config.items() if key != "tie_word_embeddings"}
    nested = {"model_type": "wrapper", "text_config": config | {"tie_word_embeddings": True}}
    assert read_layout(nested, shapes).geometry.tied_embeddings
    assert not read_layout(config, shapes).geometry.tied_embeddings
    del shapes["lm_head.weight"]
    assert read_layout(config, shapes).geometry.tied_embeddings


@pytest.mark.parametrize(
    ("remove", "change", "words"),
    [
        ("model.layers.0.self_attn.q_proj.weight", {}, "layer 0 has no attention.q, which other layers have"),
        ("model.layers.1.mlp.experts.2.up_proj.weight", {}, "layer 1: experts.up of expert 2 is missing"),
        ("model.layers.1.mlp.experts.3.up_proj.weight", {}, "layer 1: experts.up of expert 3 is missing"),
        ("model.layers.1.mlp.experts.3.", {}, "layer 1: experts.down of expert 3 is missing"),
        ("model.layers.1.mlp.gate.weight", {}, "layer 1 has no router"),
        ("model.layers.1.", {}, "num_hidden_layers is 2, but the weights hold 1 decoder layers"),
        ("lm_head.weight", {}, "does not tie"),
        (None, {"hidden_size": 64}, "hidden_size is 64, but the width of the embeddings is 32"),
        (None, {"vocab_size": 100}, "vocab_size is 100, but the rows of the embeddings are 96"),
        (None, {"num_experts": 3}, "num_experts is 3, but layer 0 has 4 experts"),
        (None, {"num_hidden_layers": "two"}, "expected a positive integer"),
    ],
)
def test_contradictions_are_one_line(remove: str | None, change: dict[str, object], words: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("qwen3_moe", tmp_path / "q"))
    config = {key: value for key, value in checkpoint.config.items() if key != "num_local_experts"}
    config = {**config, "num_experts": 4, **change}
    shapes = {n: info.shape for n, info in checkpoint.items() if remove is None or not n.startswith(remove)}
    with pytest.raises(BadDataError) as caught:
        read_layout(config, shapes)
    assert words in str(caught.value)


def test_what_the_table_does_not_have_is_named_and_refuses_nothing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("llama", tmp_path / "l"))
    shapes = {name.replace("self_attn", "memory"): info.shape for name, info in checkpoint.items()}
    shapes["to_words.weight"] = shapes.pop("lm_head.weight")
    shapes["model.rotary_emb.inv_freq"] = (4,)
    shapes["model.layers.0.mlp.up_proj.weight"] = shapes["model.layers.1.mlp.up_proj.weight"] = (48, 16)
    layout = read_layout(checkpoint.config | {"model_type": "something"}, shapes)
    assert layout.without_role["model.layers.0.memory.q_proj.weight"] == "the table of roles does not have it"
    assert (
        "48×16 is not that of dense.up, with a width of 32" in layout.without_role["model.layers.0.mlp.up_proj.weight"]
    )
    assert layout.find("dense.down", 1)
    assert layout.without_role["to_words.weight"] == "the table of roles does not have it"
    assert "recomputed" in layout.ignored["model.rotary_emb.inv_freq"]
    assert layout.parts_of("model.layers.0.memory.q_proj.weight") == ()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sizes_come_from_the_shapes(model_type: str, tmp_path: Path) -> None:
    config = configuration(model_type)
    geometry = layout_of(saved(model_type, tmp_path / "m")).geometry
    moe = model_type in ("qwen3_moe", "mixtral", "glm4_moe")
    assert (geometry.experts, geometry.experts_per_token) == ((4, 2) if moe else (0, 0))
    width = {"qwen3_moe": 16, "mixtral": 48, "glm4_moe": 16}
    assert geometry.expert_neurons == width.get(model_type, 0)
    assert geometry.neurons == (0 if model_type in ("qwen3_moe", "mixtral") else 48)
    assert (geometry.key_value_heads, geometry.head_dimension) == (config.num_key_value_heads, 8)
