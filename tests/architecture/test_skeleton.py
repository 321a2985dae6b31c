"""The model that is built from a checkpoint's config.json is the one its users load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_svd_distill.architecture.building import parse_config
from moe_svd_distill.architecture.skeleton import EMBEDDING, HEAD, OUTSIDE, build_skeleton, layer_count
from moe_svd_distill.errors import BadDataError, DistillError, IncompatiblePairError
from tests.architecture.conftest import Case
from tests.support import architectures

WRAPPERS = ("gemma3", "gemma4", "kimi_k25", "llama4", "minimax_m3_vl", "mistral3", "qwen3_5_moe")


def test_the_class_is_the_checkpoints(case: Case) -> None:
    assert type(case.skeleton.model) is type(case.resident)
    assert case.skeleton.model.training is False


def test_every_stored_tensor_of_the_model_has_a_slot(case: Case) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in case.resident.state_dict().items()}
    assert {name: slot.shape for name, slot in case.skeleton.slots.items()} == expected


def test_layers_embeddings_and_head_are_found(case: Case) -> None:
    skeleton = case.skeleton
    assert len(skeleton.originals) == architectures.LAYERS == layer_count(case.checkpoint.config, "model")
    assert {slot.part for slot in skeleton.slots.values()} >= {*range(architectures.LAYERS), EMBEDDING, HEAD}
    of_module = {id(module): name for name, module in case.resident.named_modules()}
    for part, module in (
        (EMBEDDING, case.resident.get_input_embeddings()),
        (HEAD, case.resident.get_output_embeddings()),
    ):
        assert f"{of_module[id(module)]}.weight" in {slot.name for slot in skeleton.of_part(part)}
    assert skeleton.vocabulary == architectures.VOCABULARY


def test_buffers_that_no_checkpoint_holds_are_computed(case: Case) -> None:
    computed = dict(case.skeleton.model.named_buffers())
    for name, buffer in case.resident.named_buffers():
        if name not in case.skeleton.slots and case.skeleton.part_of_name(name) != OUTSIDE:
            assert torch.equal(computed[name], buffer), name


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_the_text_only_class_takes_the_same_checkpoint(model_type: str, make_case: Callable[[str], Case]) -> None:
    """Its parameters are those of the checkpoint's own class, without what only pictures or sound go through."""
    whole = make_case(model_type)
    text = Case(whole.folder, text_only=True)
    assert type(text.skeleton.model).__name__.endswith("ForCausalLM")
    assert type(text.skeleton.model) is not type(whole.skeleton.model)
    expected, found = whole.resident.state_dict(), text.skeleton.model.state_dict()
    of_layers = [slot.name for slot in text.skeleton.slots.values() if isinstance(slot.part, int)]
    assert len(of_layers) == sum(isinstance(slot.part, int) for slot in whole.skeleton.slots.values())
    for name in of_layers:
        there = whole.skeleton.prefix + name.removeprefix(text.skeleton.prefix)
        assert torch.equal(found[name], expected[there]), name
    for part in (EMBEDDING, HEAD):
        ours, theirs = (skeleton.of_part(part)[0].name for skeleton in (text.skeleton, whole.skeleton))
        assert torch.equal(found[ours], expected[theirs])
    assert text.stored.unused == whole.stored.unused


def refusal(config: dict[str, Any], **options: Any) -> DistillError:
    with pytest.raises(DistillError) as raised:
        build_skeleton(config, "some/model", torch.float32, "cpu", **options)
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize("fields", [{"model_type": "kimi_k3"}, {}])
def test_a_type_that_transformers_does_not_know_is_refused(fields: dict[str, Any]) -> None:
    error = refusal({**fields, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    assert isinstance(error, BadDataError)
    assert f"some/model: config.json says model_type {fields.get('model_type')!r}" in error.what
    assert "newer transformers" in error.action


def test_a_model_without_a_language_model_is_refused() -> None:
    error = refusal({"model_type": "vit"})
    assert isinstance(error, IncompatiblePairError)
    assert "no language model for model_type vit" in error.what


def test_there_is_no_text_only_class_for_every_wrapper(make_case: Callable[[str], Case]) -> None:
    error = refusal(dict(make_case("step3p7").checkpoint.config), text_only=True)
    assert "no text-only language model for model_type step3p7" in error.what
    assert "class of the checkpoint" in error.action


def test_a_configuration_that_cannot_be_built_is_refused(make_case: Callable[[str], Case]) -> None:
    error = refusal({**make_case("llama").checkpoint.config, "num_attention_heads": 0})
    assert isinstance(error, BadDataError)
    assert error.what.startswith("transformers cannot build some/model from its config.json")


def test_numbers_without_a_sign_in_json_are_understood() -> None:
    config = parse_config({"model_type": "nemotron_h", "time_step_limit": [0.0, {"__float__": "Infinity"}]}, "model")
    assert tuple(config.time_step_limit) == (0.0, float("inf"))


def test_code_that_a_checkpoint_names_is_not_run(make_case: Callable[[str], Case]) -> None:
    """The architecture's own code is taken, whatever `auto_map` says."""
    config = {**make_case("llama").checkpoint.config, "auto_map": {"AutoConfig": "evil.Config"}}
    assert type(build_skeleton(config, "model", torch.float32, "cpu").model).__name__ == "LlamaForCausalLM"
