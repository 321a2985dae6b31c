"""PEFT's arrangement of a parameter of experts, against its own arithmetic and back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_svd_distill.adapter.keys import Factors, expert_factors, fuse, fused_rank, of_matrix
from moe_svd_distill.adapter.low_rank_pairs import norm_of_pair
from moe_svd_distill.architecture.matrices import Kind, Matrix
from moe_svd_distill.architecture.skeleton import ParameterSlot
from moe_svd_distill.architecture.stored import StoredSlice

SIZES = st.integers(1, 5)


@st.composite
def parameters(draw: st.DrawFn) -> tuple[list[Matrix], dict[str, Factors]]:
    """A parameter of experts with one, two or three matrices side by side in each, and a pair of each matrix."""
    experts, out, width = draw(st.integers(1, 4)), draw(SIZES), draw(SIZES)
    sides, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    of_rows = draw(st.booleans())  # gate|up beside each other in the outputs, or parts of the inputs
    ranks = draw(st.lists(st.integers(1, 3), min_size=sides, max_size=sides))
    rows, columns = (out * sides, width) if of_rows else (out, width * sides)
    shape = (experts, columns, rows) if transposed else (experts, rows, columns)
    module = nn.Module()
    module.is_transposed = transposed and draw(st.booleans())  # type: ignore[assignment]  # Llama 4 does not say so
    slot = ParameterSlot("p", module, "p", shape, torch.float32, False, 0)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    matrices, factors = [], {}
    for expert in range(experts):
        for side, rank in enumerate(ranks):
            name, step = f"{expert}.{side}", out if of_rows else width
            begin = None if sides == 1 else side * step
            piece = StoredSlice(name, expert, 0 if of_rows != transposed else 1, begin, step)
            matrices.append(Matrix(name, Kind.EXPERT, 0, slot, piece, transposed))
            factors[name] = torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)
    return matrices, factors


@settings(deadline=None)
@given(parameters())
def test_peft_makes_the_products_of_every_matrix(drawn: tuple[list[Matrix], dict[str, Factors]]) -> None:
    matrices, factors = drawn
    left, right = fuse(matrices, factors.__getitem__)
    first = matrices[0]
    experts, rank = first.experts, fused_rank(matrices, lambda name: factors[name][1].shape[0])
    assert right.shape[0] == left.shape[1] == experts * rank
    # PEFT 0.21, ParamWrapper.get_delta_weight: einsum of B (out, r, E) and A (E, r, in)
    product = torch.einsum("ore,eri->eoi", left.view(len(left), rank, experts), right.view(experts, rank, -1))
    change = product.mT if first.transposed and not first.swapped_in_peft else product
    assert change.shape == first.slot.shape
    for matrix in matrices:
        wanted = factors[matrix.name][0] @ factors[matrix.name][1]
        torch.testing.assert_close(matrix.within(change), wanted)
        number = matrix.piece.index or 0
        found = of_matrix(matrix, expert_factors(left, right, experts, number))
        torch.testing.assert_close(found[0] @ found[1], wanted)
    assert abs(norm_of_pair(left, right, experts) - float(product.norm())) < 1e-3 * (1 + float(product.norm()))
