"""Every stored tensor in its place: nothing missing, nothing left over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_svd_distill.architecture.skeleton import EMBEDDING, ENDS, HEAD, OUTSIDE, build_skeleton
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.pipeline.pair import open_model
from moe_svd_distill.roles import read_layout
from tests.architecture.conftest import Case
from tests.support import architectures

Change = Callable[[dict[str, Tensor]], object]


def test_every_parameter_has_the_values_that_transformers_gives_it(case: Case) -> None:
    """Read as the map says: copied piece by piece, or made by an operation of transformers."""
    expected, found = case.resident.state_dict(), case.skeleton.model.state_dict()
    filled = {slot.name for part in case.stored.of_part.values() for source in part for slot in source.slots}
    assert filled == {name for name, slot in case.skeleton.slots.items() if slot.part != OUTSIDE}
    for name in filled:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


def test_every_stored_tensor_is_used_once_or_named(case: Case) -> None:
    """What is unused belongs to no layer; only parameters that are tied take the same tensor."""
    taken = [name for part in case.stored.of_part.values() for source in part for name in source.hub_names]
    assert {*taken, *case.stored.unused} == set(case.checkpoint)
    assert not {*taken} & {*case.stored.unused}
    tied = getattr(case.resident, "all_tied_weights_keys", None) or {}
    assert len(taken) == len({*taken}) + len(tied)
    parts = (EMBEDDING, ENDS, *range(len(case.skeleton.originals)))
    assert case.stored.decoder_bytes() == sum(case.stored.bytes_of(part) for part in parts)
    assert case.stored.decoder_bytes() + case.stored.bytes_of(HEAD) == sum(
        case.checkpoint[name].bytes for name in taken
    )


def test_tied_embeddings_are_the_head(make_case: Callable[[str], Case], tmp_path: Path) -> None:
    case = Case(architectures.saved("llama", tmp_path / "model", tie_word_embeddings=True))
    head, embedding = (case.stored.of_part[part][0] for part in (HEAD, EMBEDDING))
    assert "lm_head.weight" not in case.checkpoint
    assert head.hub_names == embedding.hub_names
    assert torch.equal(case.skeleton.head.weight, case.resident.get_input_embeddings().weight)


def changed(case: Case, folder: Path, change: Change) -> Checkpoint:
    """The checkpoint in one file, with its tensors changed."""
    weights = {name: tensor for file in case.folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(case.checkpoint.config)))
    return open_checkpoint(folder)


def mapped(checkpoint: Checkpoint) -> CheckpointMap:
    return CheckpointMap(checkpoint, build_skeleton(checkpoint.config, checkpoint.source, torch.float32, "cpu"))


def refusal(checkpoint: Checkpoint) -> str:
    with pytest.raises(BadDataError) as raised:
        mapped(checkpoint)
    assert "\n" not in str(raised.value)
    assert raised.value.action == "Fetch the model again, or report the architecture to the project"
    return raised.value.what


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("glm4_moe", "model.layers.1.self_attn.k_proj.weight"),
        ("glm4_moe", "model.layers.1.mlp.experts.2.up_proj.weight"),
        ("glm4_moe", "model.layers.2.mlp.gate.e_score_correction_bias"),
        ("glm4_moe", "model.norm.weight"),
        ("glm4_moe", "model.embed_tokens.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        ("nemotron_h", "backbone.layers.3.mixer.experts.1.down_proj.weight"),
        ("granitemoe", "model.layers.0.input_layernorm.weight"),
    ],
)
def test_a_missing_tensor_is_named(
    model_type: str, name: str, make_case: Callable[[str], Case], tmp_path: Path
) -> None:
    checkpoint = changed(make_case(model_type), tmp_path, lambda weights: weights.pop(name))
    assert f"{name} is missing" in refusal(checkpoint)


def test_a_missing_3d_tensor_is_named_as_in_memory(make_case: Callable[[str], Case], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert f"{name} is missing" in refusal(changed(make_case("gpt_oss"), tmp_path, lambda weights: weights.pop(name)))


def test_a_tensor_of_a_layer_without_a_place_is_named(make_case: Callable[[str], Case], tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.sink.weight"
    checkpoint = changed(make_case("glm4_moe"), tmp_path, lambda weights: weights.update({name: torch.ones(2)}))
    assert f"{name} has no place in Glm4MoeForCausalLM" in refusal(checkpoint)


@pytest.mark.parametrize("attribute", ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "attention.bias", "masked_bias"])
def test_buffers_that_older_versions_stored_are_listed(
    attribute: str, make_case: Callable[[str], Case], tmp_path: Path
) -> None:
    name = f"model.layers.1.self_attn.{attribute}"
    checkpoint = changed(make_case("glm4_moe"), tmp_path, lambda weights: weights.update({name: torch.ones(4)}))
    assert mapped(checkpoint).unused == (name,)
    shapes = {name: info.shape for name, info in checkpoint.items()}
    assert "recomputed" in read_layout(checkpoint.config, shapes).ignored[name], "the weights stage has the same list"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "kimi_linear"])
def test_a_model_saved_as_transformers_holds_it(model_type: str, tmp_path: Path) -> None:
    """``save_original_format=False``: experts in one tensor, and names in memory."""
    model = architectures.build(model_type)
    hub = architectures.save(model, tmp_path / "hub")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    one, other = (open_model(str(folder)) for folder in (hub, tmp_path / "memory"))
    assert other.architecture.stored.unused == ()
    assert set(one.keys.targets) == set(other.keys.targets)


def test_what_the_model_does_not_run_is_listed(make_case: Callable[[str], Case], tmp_path: Path) -> None:
    """A layer for multi-token prediction behind the decoder's own, and something beside the decoder."""
    extra = {"model.layers.4.eh_proj.weight": torch.ones(2), "visual.patch.weight": torch.ones(3)}
    checkpoint = changed(make_case("glm4_moe"), tmp_path, lambda weights: weights.update(extra))
    assert mapped(checkpoint).unused == tuple(sorted(extra))


@pytest.mark.parametrize(
    ("model_type", "name", "what"),
    [
        ("glm4_moe", "model.layers.1.self_attn.k_proj.weight", "{} is 3×32, the config needs 16×32"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", "{} is 3×32, the config needs 4×48×32"),
        (
            "glm4_moe",
            "model.layers.1.mlp.experts.2.up_proj.weight",
            "cannot make model.layers.1.mlp.experts.gate_up_proj",
        ),
    ],
)
def test_a_wrong_shape_is_named(
    model_type: str, name: str, what: str, make_case: Callable[[str], Case], tmp_path: Path
) -> None:
    checkpoint = changed(make_case(model_type), tmp_path, lambda weights: weights.update({name: torch.ones(3, 32)}))
    assert what.format(name) in refusal(checkpoint)


def test_a_buffer_that_nobody_computes_is_named(
    make_case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoePreTrainedModel

    for kind in (PreTrainedModel, Glm4MoePreTrainedModel):
        monkeypatch.setattr(kind, "_init_weights", lambda self, module: None)
    with pytest.raises(BadDataError, match=r"does not compute the buffer model.rotary_emb.\w+"):
        make_case("glm4_moe").empty_skeleton()
