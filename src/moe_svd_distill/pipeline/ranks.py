"""Which matrices the refined stage trains, at which ranks, and how many numbers that are."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_svd_distill.pipeline.pair import Model
    from moe_svd_distill.recipe import Recipe


def trained_ranks(recipe: Recipe, student: Model) -> dict[str, int]:
    """Rank of every matrix of the layers that is trained."""
    return {
        name: recipe.rank_of(name, meaning.role, (meaning.shape[0], meaning.shape[1]))
        for name, meaning in student.layout.meanings.items()
        if meaning.layer is not None and meaning.is_matrix
    }


def trained_numbers(shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int]) -> int:
    """How many numbers move: two factors of each matrix, or the whole change where the rank is full."""
    return sum(
        prod(shapes[name]) if rank >= min(shapes[name]) else rank * sum(shapes[name]) for name, rank in ranks.items()
    )
