"""How the refined stage goes through its text: passes over it, tokens of a step and of a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from moe_svd_distill.pipeline.extra_text import MUCH_TEXT, for_training

if TYPE_CHECKING:
    from moe_svd_distill.recipe import Recipe

OptimiserName: TypeAlias = Literal["muon", "adamw"]

_EPOCHS_OF_LITTLE, _EPOCHS_OF_MUCH, _SHARE_AFTER_WEIGHTS = 4.0, 2.75, 0.2
_EPOCHS_OF_FIXED_HEAD = 2.0
_TOKENS_OF_A_ROW = 4
_RATES: Mapping[OptimiserName, float] = {"muon": 0.6, "adamw": 0.18}
_MEASURING_SHARE, _TRAINING_COST, _FEWEST_CHECKS = 0.125, 3, 2
_STEPS, _SMALLEST_STEP, _LARGEST_STEP = 3072, 512, 65536


def epochs(recipe: Recipe, stages: Sequence[str], head_moves: bool) -> float:
    """Passes over the text.

    Args:
        recipe: What is asked for.
        stages: Of the run.
        head_moves: Whether the head is trained; all else has learnt what carries over to other text after two passes
            (docs/decisions/0025).
    """
    if recipe.training.epochs != "auto":
        return recipe.training.epochs
    if not head_moves and "weights" not in stages:
        return _EPOCHS_OF_FIXED_HEAD
    passes = _EPOCHS_OF_LITTLE if recipe.tokens <= MUCH_TEXT else _EPOCHS_OF_MUCH
    return passes * (_SHARE_AFTER_WEIGHTS if "weights" in stages else 1.0)


def trains_head(recipe: Recipe, rows: int) -> bool:
    """Whether the head moves in training: as asked, or where the text has a few tokens for each of its rows.

    With fewer the head learns what these documents say, and that does not carry over to others (docs/decisions/0025).

    Args:
        recipe: What is asked for.
        rows: Of the head: tokens that both models have.
    """
    if recipe.training.head != "auto":
        return recipe.training.head == "train"
    copies = for_training(recipe, recipe.tokens, 1, identical=True).sequences(1)
    return recipe.tokens * (1 + copies) >= _TOKENS_OF_A_ROW * rows


def optimiser(recipe: Recipe, head_moves: bool) -> OptimiserName:
    """What moves the factors: as asked, or what was better on pairs like this (docs/decisions/0017 and 0025)."""
    if recipe.training.optimiser != "auto":
        return recipe.training.optimiser
    return "muon" if head_moves else "adamw"


def learning_rate(recipe: Recipe, moved_by: OptimiserName, width: int) -> float:
    """Largest learning rate: as asked, or what was good at two widths, as a number divided by the width.

    Args:
        recipe: What is asked for.
        moved_by: From `optimiser`.
        width: Of the student's residual stream.
    """
    asked = recipe.training.learning_rate
    return _RATES[moved_by] / width if asked == "auto" else float(asked)


def checks(recipe: Recipe, trained: int, measured: int) -> int:
    """How often the student is measured in training: as asked, or less often where that took too much of the time.

    Args:
        recipe: What is asked for.
        trained: Tokens trained on in all; each costs about three that are measured.
        measured: Tokens that are measured each time.
    """
    affordable = int(_MEASURING_SHARE * _TRAINING_COST * trained / max(1, measured))
    return min(recipe.training.checks, max(_FEWEST_CHECKS, affordable))


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
