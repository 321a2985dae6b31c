"""What an adapter can change: every matrix once, named, and the right way round."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from moe_svd_distill.architecture.matrices import Kind
from tests.architecture.conftest import Case


def test_a_matrix_is_what_transformers_multiplies_with(case: Case) -> None:
    """(out, in), as the stored tensor that it is or as a view of the parameter that holds it."""
    expected = case.resident.state_dict()
    for matrix in case.matrices:
        whole = expected[matrix.slot.name]
        if matrix.stored:
            assert torch.equal(matrix.value, case.checkpoint.read(matrix.name)), matrix.name
        elif (expert := re.fullmatch(r".*\[(\d+)]", matrix.name)) is not None:
            found = whole[int(expert[1])]
            assert torch.equal(matrix.value, found.T if matrix.transposed else found), matrix.name
        else:
            assert torch.equal(matrix.value, whole), matrix.name
        assert matrix.shape == tuple(matrix.value.shape)
        assert matrix.value.untyped_storage().data_ptr() == matrix.parameter.untyped_storage().data_ptr()


def test_experts_take_hidden_states_and_give_them(case: Case) -> None:
    """Which side is which is told by the sizes: nothing else in an expert is as wide as the hidden states."""
    width = case.resident.config.get_text_config().hidden_size
    of_experts = [matrix for matrix in case.matrices if matrix.kind is Kind.EXPERT]
    for matrix in of_experts:
        first = bool(re.search(r"gate|up|w1|w3|fc1|input_linear", matrix.slot.name.rpartition("experts")[2]))
        rows, columns = matrix.shape
        assert (columns if first else rows) == width, matrix.name
        assert (rows if first else columns) != width, matrix.name


def test_names_are_unique_and_cover_every_parameter_of_the_layers(case: Case) -> None:
    """Every element of every parameter belongs to one matrix, or its tensors are left out with a reason."""
    names = [matrix.name for matrix in case.matrices]
    assert len(names) == len({*names})
    assert not {*names} & {*case.matrices.left_out}
    covered: dict[str, int] = {}
    for matrix in case.matrices:
        assert case.matrices.of_layer[matrix.slot.part].count(matrix) == 1
        covered[matrix.slot.name] = covered.get(matrix.slot.name, 0) + matrix.value.numel()
    for layer in range(len(case.skeleton.originals)):
        for source in case.stored.of_part[layer]:
            left_out = {name for name in source.hub_names if name in case.matrices.left_out}
            if left_out:
                assert left_out == set(source.hub_names)
                assert not {slot.name for slot in source.slots} & covered.keys()
            else:
                for slot in source.slots:
                    assert covered[slot.name] == slot.module._parameters[slot.attribute].numel(), slot.name


def test_what_is_left_out_has_a_reason(case: Case) -> None:
    """No ordinary linear map is among it, unless several layers share it."""
    linear = {name: module for name, module in case.resident.named_modules() if type(module) is torch.nn.Linear}
    in_memory = {
        hub_name: slot.name
        for layer in range(len(case.skeleton.originals))
        for source in case.stored.of_part[layer]
        for slot in source.slots
        for hub_name in source.hub_names
    }
    for hub_name, reason in case.matrices.left_out.items():
        assert reason
        assert "\n" not in reason
        path, _, attribute = in_memory[hub_name].rpartition(".")
        assert attribute != "weight" or path not in linear or reason == "shared by several layers", hub_name


def test_gradients_are_views_too(make_case: Callable[[str], Case]) -> None:
    """Of an expert stored (in, out), and of one that shares its tensor with others."""
    for model_type in ("gpt_oss", "qwen3_moe"):
        matrix = next(m for m in make_case(model_type).matrices if m.kind is Kind.EXPERT)
        matrix.parameter.grad = torch.zeros_like(matrix.parameter)
        matrix.gradient.fill_(1.0)
        assert matrix.gradient.shape == matrix.value.shape
        assert int(matrix.parameter.grad.sum()) == matrix.value.numel()
        matrix.parameter.grad = None


@pytest.mark.parametrize(
    ("model_type", "name", "kind", "shape", "transposed", "stored"),
    [
        ("llama", "model.layers.0.mlp.down_proj.weight", Kind.LINEAR, (32, 48), False, True),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", Kind.EXPERT, (32, 48), False, True),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", Kind.PARAMETER, (4, 32), False, True),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj[2]", Kind.EXPERT, (96, 32), True, False),
        ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight[1]", Kind.EXPERT, (96, 32), False, False),
        (
            "llama4",
            "language_model.model.layers.1.feed_forward.experts.down_proj[0]",
            Kind.EXPERT,
            (32, 48),
            True,
            False,
        ),
        ("nemotron_h", "backbone.layers.3.mixer.experts.1.up_proj.weight", Kind.EXPERT, (24, 32), False, True),
        ("qwen3_5_moe", "model.language_model.layers.1.self_attn.o_proj.weight", Kind.LINEAR, (32, 32), False, True),
        (
            "minimax_m3_vl",
            "model.language_model.layers.1.mlp.shared_experts.gate_up_proj.weight",
            Kind.LINEAR,
            None,
            False,
            False,
        ),
    ],
)
def test_names_are_the_checkpoints(
    model_type: str,
    name: str,
    kind: Kind,
    shape: tuple[int, int] | None,
    transposed: bool,
    stored: bool,
    make_case: Callable[[str], Case],
) -> None:
    """Experts in one tensor have a number; what an operation makes of several tensors has its name in memory."""
    matrix = {matrix.name: matrix for matrix in make_case(model_type).matrices}[name]
    assert (matrix.kind, matrix.transposed, matrix.stored) == (kind, transposed, stored)
    assert shape is None or matrix.shape == shape


def test_a_block_that_layers_share_is_left_out(make_case: Callable[[str], Case]) -> None:
    matrices = make_case("zamba2").matrices
    shared = {name for name, reason in matrices.left_out.items() if reason == "shared by several layers"}
    assert any("shared_transformer" in name for name in shared)
    assert not any(matrix.name in shared for matrix in matrices)


def test_gpt2_has_nothing_to_change(make_case: Callable[[str], Case]) -> None:
    matrices = make_case("gpt2").matrices
    assert not list(matrices)
    assert any("Conv1D" in reason for reason in matrices.left_out.values())
