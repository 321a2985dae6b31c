"""A streamed pass gives what the whole model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from moe_svd_distill.adapter.adapter_file import sha256_of
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.errors import BadDataError, UsageError
from moe_svd_distill.streaming import Decoder, PassSettings, ScaledAdapter, load_head, stream_states
from tests.streaming.conftest import LENGTH, Case, outcome, resident
from tests.support import tiny
from tests.support.scaling import groups_of, scaled

Ids = NDArray[np.int64]
SETTINGS = PassSettings(batch_tokens=2 * LENGTH)
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
CPU = torch.device("cpu")

# Other architectures: alternating windows and soft caps, scaled embeddings and logits, positions that are learnt,
# layers that return tuples, tied embeddings, state-space layers, interleaved experts, fused projections.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "bloom": {"n_layer": 3, "n_head": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "phi3": {},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "moe_layers": [1]},
    "jamba": {
        "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
}  # fmt: skip


def test_equals_the_whole_model(case: Case, sequences: Ids, tmp_path: Path) -> None:
    states, logits = outcome(resident(case.folder), sequences)
    result = stream_states(case.checkpoint, sequences, tmp_path, SETTINGS)
    assert result.shape == tuple(states.shape)
    torch.testing.assert_close(result.rows(slice(None)), states, **ROUNDING)
    torch.testing.assert_close(result.rows(slice(1, 3)), states[1:3], **ROUNDING)
    torch.testing.assert_close(load_head(case.checkpoint).logits(result.rows(slice(None))), logits, **ROUNDING)


def test_equals_the_whole_model_with_its_adapter(case: Case, sequences: Ids, tmp_path: Path) -> None:
    states, logits = outcome(resident(case.folder, case.adapter), sequences)
    plain = outcome(resident(case.folder), sequences)[0]
    assert float((states - plain).abs().max()) > 0.1
    result = stream_states(case.checkpoint, sequences, tmp_path, SETTINGS, adapter=ScaledAdapter(case.adapter))
    head = load_head(case.checkpoint, adapter=ScaledAdapter(case.adapter))
    torch.testing.assert_close(result.rows(slice(None)), states, **ROUNDING)
    torch.testing.assert_close(head.logits(result.rows(slice(None))), logits, **ROUNDING)


def test_scales_by_group_as_layers_of_peft_do(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    model = resident(sparse.folder, sparse.adapter)
    scales = {group: 0.3 + 0.4 * number for number, group in enumerate(groups_of(model))}
    assert len(scales) > 1
    states, logits = outcome(scaled(model, scales), sequences)
    result = stream_states(
        sparse.checkpoint, sequences, tmp_path, SETTINGS, adapter=ScaledAdapter(sparse.adapter, scales)
    )
    head = load_head(sparse.checkpoint, adapter=ScaledAdapter(sparse.adapter, scales))
    torch.testing.assert_close(result.rows(slice(None)), states, **ROUNDING)
    torch.testing.assert_close(head.logits(result.rows(slice(None))), logits, **ROUNDING)


def test_every_group_needs_its_scale(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    scales = {"mlp": 1.0, "experts": 1.0, "head": 1.0}
    with pytest.raises(UsageError, match="No scale is given for attention"):
        stream_states(sparse.checkpoint, sequences, tmp_path, adapter=ScaledAdapter(sparse.adapter, scales))


def test_scale_zero_is_no_adapter(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    plain = stream_states(sparse.checkpoint, sequences, tmp_path, SETTINGS)
    zero = stream_states(sparse.checkpoint, sequences, tmp_path, SETTINGS, adapter=ScaledAdapter(sparse.adapter, 0.0))
    assert torch.equal(plain.rows(slice(None)), zero.rows(slice(None)))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_modules_saved_whole(tmp_path: Path, sequences: Ids, scale: float) -> None:
    """The head, as `modules_to_save`; in between lies the straight line of weights."""
    student = tiny.save_student(tmp_path / "student", "llama")
    pairs = tiny.random_pairs(student, ["model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight",
                                        "model.layers.2.mlp.down_proj.weight"])  # fmt: skip
    old = tiny.hub_weights(student)["lm_head.weight"].float()
    new = torch.randn(old.shape, generator=torch.Generator().manual_seed(3)) * 0.1
    configuration = tiny.configure(student, pairs) | {"modules_to_save": ["lm_head"]}
    whole = pairs | {"base_model.model.lm_head.weight": new}
    adapter = tiny.save_adapter(tmp_path / "adapter", student, whole, configuration)
    head = load_head(open_checkpoint(student), adapter=ScaledAdapter(adapter, scale))
    torch.testing.assert_close(head.weight, old + scale * (new - old), **ROUNDING)
    if scale == 1.0:
        states, logits = outcome(resident(student, adapter), sequences)
        result = stream_states(open_checkpoint(student), sequences, tmp_path, SETTINGS, adapter=ScaledAdapter(adapter))
        torch.testing.assert_close(result.rows(slice(None)), states, **ROUNDING)
        torch.testing.assert_close(head.logits(states), logits, **ROUNDING)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_pairs_of_the_embeddings_leave_the_table_in_its_file(tmp_path: Path, sequences: Ids, scale: float) -> None:
    student = tiny.save_student(tmp_path / "student", "qwen3")
    pairs = tiny.random_pairs(student, tiny.carried(student, embedding=True))
    adapter = tiny.save_adapter(tmp_path / "adapter", student, pairs)
    model = resident(student, adapter)
    scales = dict.fromkeys(groups_of(model), scale)
    states, _ = outcome(scaled(model, scales), sequences)
    result = stream_states(
        open_checkpoint(student),
        sequences,
        tmp_path,
        SETTINGS,
        adapter=ScaledAdapter(adapter, scales),
    )
    torch.testing.assert_close(result.rows(slice(None)), states, **ROUNDING)
    table = open_checkpoint(student)["model.embed_tokens.weight"]
    whole = sum(info.bytes for name, info in open_checkpoint(student).items() if name != "lm_head.weight")
    unread = table.shape[0] - len(np.unique(sequences))
    assert result.record.bytes_read == whole - unread * table.bytes // table.shape[0]


def other(folder: Path, model_type: str, **changes: Any) -> Path:
    """A model of any architecture with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**tiny.COMMON, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_architectures(name: str, sequences: Ids, tmp_path: Path) -> None:
    folder = other(tmp_path / "model", name, **OTHERS[name])
    checkpoint = open_checkpoint(folder)
    states, logits = outcome(resident(folder), sequences)
    result = stream_states(checkpoint, sequences, tmp_path, SETTINGS)
    torch.testing.assert_close(result.rows(slice(None)), states.view(result.shape), **ROUNDING)
    torch.testing.assert_close(load_head(checkpoint).logits(result.rows(slice(None))), logits, **ROUNDING)
    assert result.record.bytes_read == result.record.bytes_needed > 0


def test_tied_embeddings(sequences: Ids, tmp_path: Path) -> None:
    folder = tiny.save_student(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    assert "lm_head.weight" not in tiny.hub_weights(folder)
    states, logits = outcome(resident(folder), sequences)
    result = stream_states(open_checkpoint(folder), sequences, tmp_path, SETTINGS)
    torch.testing.assert_close(load_head(open_checkpoint(folder)).logits(states), logits, **ROUNDING)
    torch.testing.assert_close(result.rows(slice(None)), states, **ROUNDING)


@pytest.mark.parametrize("settings", [PassSettings(batch_tokens=1), PassSettings(batch_tokens=7 * LENGTH)])
def test_any_batch_size(sparse: Case, sequences: Ids, tmp_path: Path, settings: PassSettings) -> None:
    states, _ = outcome(resident(sparse.folder), sequences)
    result = stream_states(sparse.checkpoint, sequences, tmp_path, settings)
    torch.testing.assert_close(result.rows(slice(None)), states, **ROUNDING)


def test_devices_share_a_pass(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    alone = stream_states(sparse.checkpoint, sequences, tmp_path / "1", SETTINGS, adapter=ScaledAdapter(sparse.adapter))
    shared = PassSettings(("cpu", "cpu"), batch_tokens=SETTINGS.batch_tokens)
    together = stream_states(
        sparse.checkpoint, sequences, tmp_path / "2", shared, adapter=ScaledAdapter(sparse.adapter)
    )
    assert sha256_of(together.path) == sha256_of(alone.path)
    assert together.record.bytes_read == alone.record.bytes_read


def test_spilled_states_give_the_same_bits(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    resting = stream_states(sparse.checkpoint, sequences, tmp_path / "1", SETTINGS)
    none = PassSettings(batch_tokens=SETTINGS.batch_tokens, activation_bytes=0)
    spilled = stream_states(sparse.checkpoint, sequences, tmp_path / "2", none)
    assert (resting.record.spilled, spilled.record.spilled) == (False, True)
    assert sha256_of(spilled.path) == sha256_of(resting.path)


def held(decoder: Decoder) -> dict[str, torch.Tensor]:
    """What each layer holds in memory while it computes, by its name in the whole model."""
    found = {}
    for index in range(decoder.layers):
        decoder.enter(index)
        for name, value in decoder.replicas[0].layers[index].state_dict().items():
            found[f"{decoder.skeleton.prefix}{index}.{name}"] = value.clone()
        decoder.leave(index)
    return found


def test_bfloat16(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    """In bf16, the router's correction bias stays in float32 as transformers keeps it."""
    states, _ = outcome(resident(sparse.folder, dtype=torch.bfloat16), sequences)
    settings = PassSettings(dtype=torch.bfloat16, batch_tokens=SETTINGS.batch_tokens)
    result = stream_states(sparse.checkpoint, sequences, tmp_path, settings)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.rows(slice(None)).float(), states.float(), rtol=0.1, atol=0.1)
    expected = resident(sparse.folder, dtype=torch.bfloat16).state_dict()
    seen = {name: tensor.dtype for name, tensor in held(Decoder(sparse.checkpoint, (CPU,), torch.bfloat16)).items()}
    assert seen == {name: tensor.dtype for name, tensor in expected.items() if ".layers." in name}
    assert torch.float32 in seen.values()


def test_states_that_are_not_finite_are_named(sequences: Ids, tmp_path: Path) -> None:
    folder = tiny.save_student(tmp_path / "model", "llama")
    model = tiny.load_model(folder)
    with torch.no_grad():
        for projection in ("up_proj", "down_proj"):
            getattr(model.model.layers[1].mlp, projection).weight.mul_(1e30)
    model.save_pretrained(folder)
    with pytest.raises(BadDataError, match="model: layer 1 gives states that are not finite"):
        stream_states(open_checkpoint(folder), sequences, tmp_path, SETTINGS)


@pytest.mark.parametrize("wrong", [np.array([[64]]), np.array([[-1]])])
def test_unknown_tokens_are_refused(sparse: Case, tmp_path: Path, wrong: Ids) -> None:
    with pytest.raises(UsageError, match="the model has 64 tokens"):
        stream_states(sparse.checkpoint, wrong, tmp_path)


def test_threads_share_the_batches_and_change_no_bit(case: Case, sequences: Ids, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with stream_states(
                case.checkpoint, sequences, tmp_path / str(threads), SETTINGS, adapter=ScaledAdapter(case.adapter)
            ) as s:
                found.append(s.rows(slice(None)).clone())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_devices_of_two_kinds_are_refused(sparse: Case, sequences: Ids, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found cpu, cuda"):
        stream_states(sparse.checkpoint, sequences, tmp_path, PassSettings(("cpu", "cuda:0")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("devices", [("cuda:0",), ("cuda:0", "cuda:0")])
def test_on_a_gpu(case: Case, sequences: Ids, tmp_path: Path, devices: tuple[str, ...]) -> None:
    states, _ = outcome(resident(case.folder, case.adapter), sequences)
    settings = PassSettings(devices, torch.float32, SETTINGS.batch_tokens)
    result = stream_states(case.checkpoint, sequences, tmp_path, settings, adapter=ScaledAdapter(case.adapter))
    torch.testing.assert_close(result.rows(slice(None)), states, rtol=1e-2, atol=1e-2)
    assert load_head(case.checkpoint, devices[0]).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_factors_keep_the_type_that_users_get(make_case: Any, tmp_path: Path, stored: torch.dtype) -> None:
    """Beside a bf16 model PEFT keeps factors in float32, and so must a pass: rounded they would be others."""
    student = make_case("qwen3_moe").folder
    adapter = tiny.save_adapter(tmp_path / "adapter", student, tiny.random_pairs(student, dtype=stored))
    expected = {
        name: value
        for name, value in resident(student, adapter, torch.bfloat16).state_dict().items()
        if ".lora_" in name
    }
    decoder = Decoder(open_checkpoint(student), (CPU,), torch.bfloat16, adapter=ScaledAdapter(adapter))
    seen = {name: value for name, value in held(decoder).items() if ".lora_" in name}
    assert seen.keys() == {name for name in expected if ".layers." in name}
    for name, value in seen.items():
        assert (value.dtype, expected[name].dtype) == (torch.float32, torch.float32)
        assert torch.equal(value, expected[name])
