"""How the refined stage goes through its text: passes over it, tokens of a step and of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_svd_distill.pipeline.copying import MUCH_TEXT

if TYPE_CHECKING:
    from moe_svd_distill.recipe import Recipe

_EPOCHS_OF_LITTLE, _EPOCHS_OF_MUCH, _SHARE_AFTER_WEIGHTS = 4.0, 2.75, 0.2
_STEPS, _SMALLEST_STEP, _LARGEST_STEP = 3072, 512, 65536


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


def sequence_length(recipe: Recipe, longest: int) -> int:
    """Tokens of a sequence, for what both models take and is usual at most.

    Shorter ones learn faster for a while and then spoil what lies beyond them (docs/decisions/0019).
    """
    return longest if recipe.sequence_tokens == "auto" else min(longest, recipe.sequence_tokens)


def _step_tokens(recipe: Recipe, passes: float, tokens: int) -> int:
    asked = recipe.training.step_tokens
    return min(max(int(passes * tokens // _STEPS), _SMALLEST_STEP), _LARGEST_STEP) if asked == "auto" else asked
