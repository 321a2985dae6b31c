"""The learning rate, chosen by short runs from the start that are measured on other text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moe_svd_distill.training.loop import Training
from moe_svd_distill.training.settings import TrainingSettings

MULTIPLES = (0.5, 1.0, 2.0)
_SMALLEST = 1 / 16
_SHARE, _FEWEST = 0.015, 12


@dataclass(frozen=True)
class Trial:
    """A short run: its learning rate, and KL on the checking text before and after, in nats per token."""

    rate: float
    before: float
    after: float


def trial_steps(steps: int) -> int:
    """Steps of one short run, for a training of so many."""
    return min(steps, max(_FEWEST, math.ceil(_SHARE * steps)))


def choose_rate(
    begin: Callable[[TrainingSettings], Training],
    settings: TrainingSettings,
    multiples: Sequence[float] = MULTIPLES,
) -> tuple[TrainingSettings, tuple[Trial, ...]]:
    """Try the rates of the settings times each multiple for some steps, and keep those with the lowest KL.

    While the smallest is the best, half of it is tried as well, down to a sixteenth of the settings'. There is no going
    on upwards: short runs flatter large rates.

    Args:
        begin: Makes a run that begins at the start.
        settings: How the whole training will be.
        multiples: Of both rates.

    Returns:
        The settings with the rates chosen, and what was tried.
    """
    whole = begin(settings)
    steps, before = trial_steps(whole.steps), whole.measure()
    short = replace(settings, epochs=steps / whole.steps_in_epoch, checks=1, patience=1)
    trials: list[Trial] = []
    waiting = sorted(multiples, reverse=True)
    while waiting:
        multiple = waiting.pop(0)
        tried = replace(short, rate=multiple * settings.rate, head_rate=multiple * settings.head_rate)
        curve = begin(tried).complete(kl_before=before).curve
        trials.append(Trial(tried.rate, before, curve[-1].kl))
        smallest_is_best = with_best(settings, trials).rate == tried.rate
        if not waiting and smallest_is_best and multiple / 2 >= _SMALLEST:
            waiting.append(multiple / 2)
    return with_best(settings, trials), tuple(trials)


def with_best(settings: TrainingSettings, trials: Sequence[Trial]) -> TrainingSettings:
    """The settings with the rates of the best trial; of equal ones the first counts."""
    best = min(trials, key=lambda trial: trial.after if math.isfinite(trial.after) else math.inf)
    return replace(settings, rate=best.rate, head_rate=best.rate / settings.rate * settings.head_rate)
