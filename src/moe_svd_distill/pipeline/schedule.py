"""How the stages on text go through it: decided here once, printed by `plan` and followed by the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from moe_svd_distill.evaluation.scale_search import GLOBAL_SCALES
from moe_svd_distill.pipeline.extra_text import MUCH_TEXT, ExtraText, for_fit, for_training
from moe_svd_distill.pipeline.trained_matrices import tokens_at_once, trained_ranks
from moe_svd_distill.training.settings import (
    HEAD_RATE,
    LAST_LAYERS_RATE,
    TrainingSettings,
    affordable_checks,
    optimiser_steps,
    passes_over_little,
    step_over_little,
)
from moe_svd_distill.training.trials import worth_trying

if TYPE_CHECKING:
    from moe_svd_distill.pipeline.pair import Model
    from moe_svd_distill.pipeline.texts import TextSize
    from moe_svd_distill.recipe import Recipe
    from moe_svd_distill.training.settings import OptimiserName

StageName: TypeAlias = Literal["calibrated", "refined"]
_MOST_HALVINGS = 4
_SCALES_OF_A_LONG_RUN = (0.25, 0.5, 1.0)
_EPOCHS_OF_LITTLE, _EPOCHS_OF_MUCH, _SHARE_AFTER_WEIGHTS = 4.0, 2.75, 0.2
_ONE_PASS = 16_384
_TOKENS_OF_A_ROW = 4
_RATES: Mapping[OptimiserName, float] = {"muon": 0.6, "adamw": 0.18}


@dataclass(frozen=True, eq=False)
class TrainingSchedule:
    """How a stage on text goes.

    Attributes:
        stage: Its name.
        first: The layer that training begins at; `layers` for the head alone.
        layers: That the student has.
        keeps_start: Whether an adapter that it begins with stays as it is beneath what is trained, or is trained on.
        ranks: Hub name to rank of every trained matrix.
        sequences: Of one step, which the processes share.
        extra: What is read beside the text.
        steps: Of the optimiser, at most.
        tries_rates: Whether the learning rates of the settings are a guess to be tried.
        settings: Of the training.
        scales: That the result is tried at.
    """

    stage: StageName
    first: int
    layers: int
    keeps_start: bool
    ranks: Mapping[str, int]
    sequences: int
    extra: ExtraText
    steps: int
    tries_rates: bool
    settings: TrainingSettings
    scales: tuple[float, ...]

    @property
    def head_moves(self) -> bool:
        """Whether the head is trained too."""
        return self.settings.head == "whole"

    @property
    def head_alone(self) -> bool:
        """Whether no layer is trained."""
        return self.first == self.layers

    @property
    def share(self) -> float:
        """Of the layers that are run; those before them are not needed."""
        return (self.layers - self.first) / self.layers


def schedule_calibrated(
    recipe: Recipe, student: Model, text: TextSize, device: str, *, head_alone: bool
) -> TrainingSchedule:
    """The head and the last layers, on what a pass has recorded in front of them.

    Args:
        recipe: What is asked for.
        student: The student.
        text: How much of it there is.
        device: Where to compute first.
        head_alone: Whether there is an adapter already that changes the layers.
    """
    layers, length = student.architecture.layers, text.length
    trained = 0 if head_alone else min(recipe.last_layers, layers)
    extra = for_fit(recipe, text.tokens, text.sequences, text.identical)
    tokens = (text.sequences + extra.sequences(text.sequences)) * length
    step_tokens = step_over_little(tokens, head_alone=not trained)
    if trained:
        step_tokens = max(1, step_tokens // length) * length
    steps = max(1, tokens // step_tokens)
    passes = passes_over_little(None if recipe.fit_passes == "auto" else recipe.fit_passes, steps)
    width = student.architecture.head_slot.shape[1]
    settings = TrainingSettings(
        epochs=passes,
        step_tokens=step_tokens,
        batch_tokens=tokens_at_once(recipe, device),
        rate=LAST_LAYERS_RATE / width,
        head_rate=HEAD_RATE / width,
        optimiser="adamw",
        checks=passes,
        patience=passes,
        halvings=_MOST_HALVINGS,
        seed=recipe.seed,
    )
    return TrainingSchedule(
        stage="calibrated",
        first=layers - trained,
        layers=layers,
        keeps_start=True,
        ranks=trained_ranks(recipe, student, range(layers - trained, layers)),
        sequences=max(1, step_tokens // length),
        extra=extra,
        steps=passes * steps,
        tries_rates=False,
        settings=settings,
        scales=GLOBAL_SCALES,
    )


def schedule_refined(
    recipe: Recipe, student: Model, stages: Sequence[str], text: TextSize, device: str
) -> TrainingSchedule:
    """All layers, and the head where the text is enough for it; from a start or from zero.

    Args:
        recipe: What is asked for.
        student: The student.
        stages: Of the run.
        text: How much of it there is.
        device: Where to compute first.
    """
    asked, length = recipe.training, text.length
    head_moves = trains_head(recipe, text.rows)
    extra = for_training(recipe, text.tokens, text.sequences, text.identical, head_moves)
    passes = epochs(recipe, stages, head_moves)
    tokens = (text.sequences + extra.sequences(text.sequences)) * length
    steps, step_tokens = optimiser_steps(asked.step_tokens, passes, tokens, length)
    moved_by = optimiser(recipe, head_moves)
    rate = learning_rate(recipe, moved_by, student.architecture.head_slot.shape[1])
    settings = TrainingSettings(
        epochs=passes,
        step_tokens=step_tokens,
        batch_tokens=tokens_at_once(recipe, device),
        rate=rate,
        head_rate=rate * asked.head_rate,
        optimiser=moved_by,
        divergence=asked.divergence,
        cross_entropy_share=asked.cross_entropy_share,
        head="whole" if head_moves else "fixed",
        checks=affordable_checks(asked.checks, steps * step_tokens, text.check),
        patience=asked.patience,
        weight_decay=asked.weight_decay,
        seed=recipe.seed,
    )
    return TrainingSchedule(
        stage="refined",
        first=0,
        layers=student.architecture.layers,
        keeps_start=False,
        ranks=trained_ranks(recipe, student),
        sequences=step_tokens // length,
        extra=extra,
        steps=steps,
        tries_rates=asked.learning_rate == "auto" and worth_trying(steps),
        settings=settings,
        scales=_SCALES_OF_A_LONG_RUN,
    )


def epochs(recipe: Recipe, stages: Sequence[str], head_moves: bool) -> float:
    """Passes over the text.

    Without the head all has learnt what carries over to other text after two passes over little text, and after one
    over more (docs/decisions/0025).
    """
    if recipe.training.epochs != "auto":
        return recipe.training.epochs
    if not head_moves and "weights" not in stages:
        return 2.0 if recipe.tokens < _ONE_PASS else 1.0
    passes = _EPOCHS_OF_LITTLE if recipe.tokens <= MUCH_TEXT else _EPOCHS_OF_MUCH
    return passes * (_SHARE_AFTER_WEIGHTS if "weights" in stages else 1.0)


def trains_head(recipe: Recipe, rows: int) -> bool:
    """Whether the head moves in training: as asked, or where the text has a few tokens for each of its rows.

    With fewer the head learns what these documents say, and that does not carry over to others (docs/decisions/0025).
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
    """Largest learning rate: as asked, or what was good at two widths, as a number divided by the width."""
    asked = recipe.training.learning_rate
    return _RATES[moved_by] / width if asked == "auto" else float(asked)
