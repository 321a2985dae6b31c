"""The learning rate, chosen by short runs that are measured on other text.

Short runs from a start flatter small rates: a large one spoils at first what the start has, and only a long run wins it
back and more (docs/decisions/0017). So they begin with the untouched student, unless the start is so good that training
can only polish it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe_svd_distill.training.settings import TrainingSettings

if TYPE_CHECKING:
    from moe_svd_distill.training.loop import Training

MULTIPLES = (0.5, 1.0, 2.0)
POLISHING = (0.125, 0.25, 0.5)
"""Of the usual rates, for a start that is good already."""
NEARLY_THERE = 0.2
"""Share of the untouched student's KL below which a start is good already."""
_SMALLEST = 1 / 16
_SHARE, _FEWEST, _LARGEST_SHARE = 0.015, 32, 0.25
_LARGEST_COST = 1 / 3


@dataclass(frozen=True)
class RateTrial:
    """A short run: its learning rate, and KL on the checking text before and after, in nats per token."""

    rate: float
    before: float
    after: float


@dataclass(frozen=True)
class RateChoice:
    """What was tried.

    Attributes:
        trials: In order.
        start_kl: KL on the checking text at the start of the training itself.
        from_start: Whether the short runs began there as well, or with the untouched student.
    """

    trials: tuple[RateTrial, ...]
    start_kl: float
    from_start: bool


def trial_steps(steps: int) -> int:
    """Steps of one short run, for a training of so many."""
    return max(1, min(max(_FEWEST, math.ceil(_SHARE * steps)), round(_LARGEST_SHARE * steps)))


def worth_trying(steps: int) -> bool:
    """Whether the usual short runs take at most a third of the time of a training of so many steps."""
    return len(MULTIPLES) * trial_steps(steps) <= _LARGEST_COST * steps


def choose_rate(
    begin: Callable[[TrainingSettings], Training],
    settings: TrainingSettings,
    before: float,
    multiples: Sequence[float] = MULTIPLES,
) -> tuple[RateTrial, ...]:
    """Try the rates of the settings times each multiple for some steps, and measure KL after each.

    While the smallest is the best, half of it is tried as well, down to a sixteenth of the settings'. There is no going
    on upwards: short runs flatter large rates.

    Args:
        begin: Makes a run.
        settings: How the whole training will be.
        before: KL on the checking text where they begin.
        multiples: Of both rates.
    """
    whole = begin(settings)
    steps = trial_steps(whole.steps)
    short = replace(settings, epochs=steps / whole.steps_in_epoch, checks=1, patience=1)
    trials: list[RateTrial] = []
    waiting = sorted(multiples, reverse=True)
    while waiting:
        multiple = waiting.pop(0)
        tried = replace(short, rate=multiple * settings.rate, head_rate=multiple * settings.head_rate)
        curve = begin(tried).complete(kl_before=before).curve
        trials.append(RateTrial(tried.rate, before, curve[-1].kl))
        smallest_is_best = with_best(settings, trials).rate == tried.rate
        if not waiting and smallest_is_best and multiple / 2 >= _SMALLEST:
            waiting.append(multiple / 2)
    return tuple(trials)


def with_best(settings: TrainingSettings, trials: Sequence[RateTrial]) -> TrainingSettings:
    """The settings with the rates of the best trial; of equal ones the first counts."""
    best = min(trials, key=lambda trial: trial.after if math.isfinite(trial.after) else math.inf)
    return replace(settings, rate=best.rate, head_rate=best.rate / settings.rate * settings.head_rate)
