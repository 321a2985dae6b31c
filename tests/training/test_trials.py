from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from moe_svd_distill.training.loop import Training
from moe_svd_distill.training.settings import TrainingSettings
from moe_svd_distill.training.trials import POLISHING, choose_rate, trial_steps, with_best

SETTINGS = TrainingSettings(epochs=2.0, step_tokens=512, batch_tokens=512, rate=0.8, head_rate=1.6)


@dataclass
class Student:
    """A run whose KL after training depends on the learning rate alone."""

    after: Callable[[float], float]
    tried: list[float] = field(default_factory=list)
    epochs: set[float] = field(default_factory=set)

    def begin(self, settings: TrainingSettings) -> Training:
        student = self

        class Run:
            steps, steps_in_epoch = 2000, 1000

            def complete(self, kl_before: float) -> Any:
                assert kl_before == 1.0
                student.tried.append(settings.rate)
                student.epochs.add(settings.epochs)

                class Ended:
                    curve = tuple(type("Point", (), {"kl": kl})() for kl in (1.0, student.after(settings.rate)))

                return Ended()

        return cast(Training, Run())


@pytest.mark.parametrize(
    ("best", "chosen", "tried"),
    [(0.8, 0.8, 3), (5.0, 1.6, 3), (0.4, 0.4, 4), (0.1, 0.1, 6), (0.001, 0.05, 6)],
)
def test_smaller_rates_are_tried_while_they_are_better(best: float, chosen: float, tried: int) -> None:
    student = Student(lambda rate: abs(rate - best))
    trials = choose_rate(student.begin, SETTINGS, 1.0)
    settings = with_best(SETTINGS, trials)
    assert settings.rate == pytest.approx(chosen)
    assert settings.head_rate == pytest.approx(2 * chosen)
    assert len(trials) == len(student.tried) == tried
    assert student.epochs == {trial_steps(2000) / 1000}
    assert (settings.epochs, settings.checks) == (SETTINGS.epochs, SETTINGS.checks)


def test_a_run_that_ends_in_no_number_is_never_chosen() -> None:
    student = Student(lambda rate: float("nan") if rate > 0.5 else 0.9)
    assert with_best(SETTINGS, choose_rate(student.begin, SETTINGS, 1.0)).rate == pytest.approx(0.4)


def test_rates_for_polishing_are_smaller() -> None:
    student = Student(lambda rate: abs(rate - 0.1))
    trials = choose_rate(student.begin, SETTINGS, 1.0, POLISHING)
    assert student.tried == pytest.approx([0.4, 0.2, 0.1, 0.05])
    assert with_best(SETTINGS, trials).rate == pytest.approx(0.1)


@pytest.mark.parametrize(("steps", "expected"), [(10_000, 150), (512, 32), (40, 10), (3, 1), (1, 1)])
def test_trials_are_short(steps: int, expected: int) -> None:
    assert trial_steps(steps) == expected
