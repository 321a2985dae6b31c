"""What of a student is trained: its matrices, their ranks, how many numbers move, and how many tokens at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moe_svd_distill.pipeline.pair import Model
    from moe_svd_distill.recipe import Recipe

_BATCH_TOKENS = {"cpu": 512, "cuda": 8192}


def trained_ranks(recipe: Recipe, student: Model, layers: Iterable[int] | None = None) -> dict[str, int]:
    """Rank of every matrix of the layers that an adapter can change.

    Args:
        recipe: What is asked for.
        student: The student.
        layers: Of which layers; by default of all.
    """
    wanted = None if layers is None else set(layers)
    return {
        name: recipe.rank_of(name, student.role_of(name), matrix.shape)
        for name, matrix in student.keys.matrices().items()
        if wanted is None or matrix.part in wanted
    }


def trained_shapes(student: Model, ranks: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Shape of each of these matrices, (out, in)."""
    return {name: student.architecture.by_name[name].shape for name in ranks}


def trained_numbers(shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int]) -> int:
    """How many numbers move: two factors of each matrix, or the whole change where the rank is full."""
    return sum(
        prod(shapes[name]) if rank >= min(shapes[name]) else rank * sum(shapes[name]) for name, rank in ranks.items()
    )


def tokens_at_once(recipe: Recipe, device: str) -> int:
    """Tokens that go through a layer together in training."""
    asked = recipe.training.batch_tokens
    return _BATCH_TOKENS[torch.device(device).type] if asked == "auto" else asked
