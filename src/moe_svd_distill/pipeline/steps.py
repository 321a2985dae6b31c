"""How the refined stage goes through its text: passes over it, tokens of a step and of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_svd_distill.pipeline.copying import MUCH_TEXT

if TYPE_CHECKING:
    from moe_svd_distill.recipe import Recipe

_EPOCHS_OF_LITTLE, _EPOCHS_OF_MUCH, _SHARE_AFTER_WEIGHTS = 4.0, 3.0, 0.2
_STEPS, _SMALLEST_STEP, _LARGEST_STEP = 3072, 512, 65536
_SEQUENCES, _SHORTEST = 2, 256


def epochs(recipe: Recipe, stages: Sequence[str]) -> float:
    """Passes over the text of a run with these stages."""
    if recipe.training.epochs != "auto":
        return recipe.training.epochs
    passes = _EPOCHS_OF_LITTLE if recipe.tokens <= MUCH_TEXT else _EPOCHS_OF_MUCH
    return passes * (_SHARE_AFTER_WEIGHTS if "weights" in stages else 1.0)


def optimiser_steps(recipe: Recipe, passes: float, tokens: int, length: int) -> tuple[int, int]:
    """How many steps training has and how many tokens one of them, for sequences of this length."""
    wanted = _step_tokens(recipe, passes, tokens)
    sequences, together = tokens // length, max(1, round(wanted / length))
    return max(1, round(passes * max(1, sequences // together))), min(sequences, together) * length


def sequence_length(recipe: Recipe, stages: Sequence[str], longest: int) -> int:
    """Tokens of a sequence.

    What follows in one sequence is alike, so a step learns more from several short ones than from a long one
    (docs/decisions/0019): where steps are small, training takes two of half the length.

    Args:
        recipe: What is asked for.
        stages: Of the run.
        longest: What both models take, and not more than is usual.
    """
    if recipe.sequence_tokens != "auto":
        return min(longest, recipe.sequence_tokens)
    if "refined" not in stages:
        return longest
    step, length = _step_tokens(recipe, epochs(recipe, stages), recipe.tokens), longest
    while length > _SHORTEST and _SEQUENCES * length > step:
        length //= 2
    return length


def _step_tokens(recipe: Recipe, passes: float, tokens: int) -> int:
    asked = recipe.training.step_tokens
    return min(max(int(passes * tokens // _STEPS), _SMALLEST_STEP), _LARGEST_STEP) if asked == "auto" else asked
