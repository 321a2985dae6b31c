"""The head trained alone on final states: its gradient, what it reaches, and training that begins badly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_svd_distill.algebra.divergence import LogitTransform
from moe_svd_distill.algebra.whitening import whitening
from moe_svd_distill.training.engine import HeadEngine
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.loop import Training
from moe_svd_distill.training.lora_parameters import LoraParameters
from moe_svd_distill.training.measuring import StatePairs, mean_kl
from moe_svd_distill.training.progress import Progress, TrainingCheckpoints
from moe_svd_distill.training.settings import TrainingSettings
from moe_svd_distill.training.text import Batch, TrainingText
from tests.support.head_problems import Problem, all_states, reachable, second_moment, state_pairs

CPU = torch.device("cpu")
CAPPED = LogitTransform(0.7, 4.0)
SETTINGS = TrainingSettings(
    epochs=8, step_tokens=128, batch_tokens=128, rate=0.0, head_rate=0.5 / 12, checks=8, patience=8, halvings=4
)


class KilledError(Exception):
    """Stands for the death of the process."""


def _text(pairs: StatePairs) -> TrainingText:
    """All places of a problem, each a sequence of its own."""
    mine, theirs = all_states(pairs)
    places = np.arange(len(mine))
    ids, unknown = np.zeros((len(mine), 1), dtype=np.int64), np.full(len(mine), -1, dtype=np.int64)
    return TrainingText(ids, places, places, unknown, theirs, lambda rows: [mine[torch.from_numpy(rows)][:, None]])


def _head(problem: Problem, start: torch.Tensor | None = None) -> TrainedHead:
    metric = whitening(second_moment(problem.fit))
    return TrainedHead(problem.student, problem.teacher, metric, SETTINGS, start)


def _training(problem: Problem, head: TrainedHead, **values: float) -> Training:
    settings = replace(SETTINGS, **values)  # type: ignore[arg-type]
    return Training(
        HeadEngine(LoraParameters({}, {}, CPU, {}, 0)), head, _text(problem.fit), _text(problem.check), settings
    )


def _run(problem: Problem, head: TrainedHead, saves: TrainingCheckpoints | None = None, **values: float) -> Progress:
    return _training(problem, head, **values).complete(saves)


def _kl(problem: Problem, head: TrainedHead) -> float:
    return mean_kl(problem.check, problem.student.plus(head.delta), problem.teacher)


@pytest.mark.parametrize("transform", [LogitTransform(), CAPPED, LogitTransform(2.5)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_what_autograd_says_in_float64(transform: LogitTransform, bias: bool) -> None:
    problem = reachable(fit=64, check=16, tokens=11, width=7, bias=bias, transform=transform)
    head = _head(problem)
    head.values += 0.3 * torch.randn(head.values.shape, generator=torch.Generator().manual_seed(1))
    mine, theirs = (states[[41, 3, 17, 30, 59, 0]].double() for states in all_states(problem.fit))
    mine.requires_grad_()
    weights = head.values.view(11, 7).double().requires_grad_()
    offset = None if problem.student.bias is None else problem.student.bias.double()
    inverse = whitening(second_moment(problem.fit)).inverse.double()
    found = torch.log_softmax(transform(torch.nn.functional.linear(mine @ inverse, weights, offset)), dim=-1)
    linear = torch.nn.functional.linear(theirs, problem.teacher.weight.double(), offset)
    wanted = torch.log_softmax(transform(linear), dim=-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    by_weights, by_states = torch.autograd.grad(kl, (weights, mine))
    unknown = torch.full((6,), -1)
    given = head.accumulate_gradients(mine.detach().float(), Batch(unknown, unknown, theirs.float(), unknown), 6)
    torch.testing.assert_close(head.gradient.view(11, 7).double(), by_weights, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(given.double(), by_states, rtol=1e-3, atol=1e-6)
    assert float(head.loss) == pytest.approx(float(kl.detach()), rel=1e-5)


def test_mean_kl_is_the_mean_over_all_places_and_zero_for_the_teacher_itself() -> None:
    problem = reachable(fit=50, check=333, bias=True, transform=CAPPED)
    mine, theirs = all_states(problem.check)
    wanted = torch.log_softmax(problem.teacher.logits(theirs).double(), -1)
    found = torch.log_softmax(problem.student.logits(mine).double(), -1)
    kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert mean_kl(problem.check, problem.student, problem.teacher) == pytest.approx(kl, rel=1e-5)
    assert mean_kl(problem.check, problem.teacher, problem.teacher) == 0.0


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.0, 8.0)])
def test_a_head_that_can_become_the_teachers_does(transform: LogitTransform) -> None:
    problem = reachable(bias=True, transform=transform)
    head = _head(problem)
    outcome = _run(problem, head, epochs=12, checks=12)
    curve = [point.kl for point in outcome.curve]
    assert curve[0] > 0.1
    assert min(curve) < 0.02 * curve[0]
    assert _kl(problem, head) == pytest.approx(curve[outcome.best], rel=1e-3, abs=1e-6)


def test_training_that_starts_at_the_answer_stays_there_and_returns_all_of_it() -> None:
    problem = reachable()
    answer = problem.teacher.weight - problem.student.weight
    head = _head(problem, answer)
    assert _run(problem, head, epochs=2, checks=2).curve[0].kl < 1e-6
    torch.testing.assert_close(head.delta, answer, rtol=0, atol=5e-3)
    near = _head(problem, 0.5 * answer)
    outcome = _run(problem, near, epochs=4, checks=4)
    assert outcome.curve[0].kl < mean_kl(problem.check, problem.student, problem.teacher)
    assert _kl(problem, near) == pytest.approx(min(point.kl for point in outcome.curve), rel=1e-2)


def test_a_rate_too_large_is_halved_until_the_first_check_is_better_also_in_a_run_that_goes_on(tmp_path: Path) -> None:
    problem = reachable(fit=1024, size=0.1)
    whole_head = _head(problem)
    whole = _run(problem, whole_head, head_rate=0.5)
    assert whole.curve[1].kl < whole.curve[0].kl
    assert 1 <= whole.halvings <= 4
    assert len(whole.curve) == SETTINGS.checks + 1

    def stop(progress: Progress) -> None:
        if progress.halvings and progress.step == 11:
            raise KilledError

    with pytest.raises(KilledError):
        _training(problem, _head(problem), head_rate=0.5).complete(
            TrainingCheckpoints(tmp_path, "run", every_s=0.0), stop
        )
    again_head = _head(problem)
    again = _run(problem, again_head, TrainingCheckpoints(tmp_path, "run", every_s=0.0), head_rate=0.5)
    assert again.resumed_at == 10
    assert again.halvings == whole.halvings
    assert torch.equal(again_head.values, whole_head.values)


def test_a_loss_that_is_not_finite_before_the_first_check_halves_the_rate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = reachable(fit=512)
    head = _head(problem)
    learn, calls = head.accumulate_gradients, 0

    def spoiled(states: torch.Tensor, batch: Batch, places: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        slopes = learn(states, batch, places)
        if calls == 2:
            head.loss += float("nan")
        return slopes

    monkeypatch.setattr(head, "accumulate_gradients", spoiled)
    outcome = _run(problem, head, epochs=2, checks=2)
    assert (outcome.halvings, outcome.ended) == (1, "done")
    assert outcome.curve[-1].kl < outcome.curve[0].kl
    assert bool(torch.isfinite(head.values).all())


def test_where_every_check_is_worse_the_untouched_head_is_the_answer() -> None:
    problem = reachable(fit=512, size=0.02)
    head = _head(problem)
    outcome = _run(problem, head, head_rate=1e4, epochs=2, checks=2)
    assert (outcome.best, outcome.halvings) == (0, 4)
    assert float(head.delta.abs().max()) < 1e-5


def test_the_best_check_counts_not_the_last() -> None:
    generator = torch.Generator().manual_seed(5)
    problem = reachable(fit=128, check=1024, width=24, tokens=60, size=0.3)
    mine, _ = all_states(problem.fit)
    noisy = mine + 1.5 * torch.randn(mine.shape, generator=generator)  # the little text misleads: overfitting harms
    overfitted = Problem(state_pairs(mine, noisy), problem.check, problem.student, problem.teacher)
    head = _head(overfitted)
    outcome = _run(overfitted, head, epochs=60, checks=60, patience=60, head_rate=2.0 / 24)
    curve = [point.kl for point in outcome.curve]
    assert outcome.best == int(np.argmin(curve))
    assert 0 < outcome.best < 60
    assert _kl(overfitted, head) == pytest.approx(min(curve), rel=1e-3)
