"""The fit of a head: its gradient, what it reaches, and what it leaves on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_svd_distill.algebra.divergence import LogitTransform
from moe_svd_distill.fitting.check import mean_kl
from moe_svd_distill.fitting.head import HeadFit, HeadFitSettings, _Fit, fit_head
from moe_svd_distill.fitting.source import StateSource
from moe_svd_distill.streaming import Head, head_over_common_tokens
from tests.fitting.problems import Problem, reachable, state_pairs

CAPPED = LogitTransform(0.7, 4.0)


class KilledError(Exception):
    """Stands for the death of the process."""


def _source(problem: Problem) -> StateSource:
    return StateSource(problem.fit, problem.check, torch.device("cpu"))


def _run(problem: Problem, folder: Path, *, key: str = "key", **values: object) -> HeadFit:
    settings = HeadFitSettings(**{"passes": 4, **values})  # type: ignore[arg-type]
    return fit_head(_source(problem), problem.student, problem.teacher, settings, folder, key)


def _changed(problem: Problem, fitted: HeadFit) -> Head:
    return problem.student.plus(fitted.delta)


@pytest.mark.parametrize("transform", [LogitTransform(), CAPPED, LogitTransform(2.5)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_what_autograd_says_in_float64(transform: LogitTransform, bias: bool, tmp_path: Path) -> None:
    problem = reachable(fit=60, check=20, tokens=11, width=7, bias=bias, transform=transform)
    run = _Fit(_source(problem), problem.student, problem.teacher, HeadFitSettings(), tmp_path, "key", None)
    run.weights = run.first + 0.3 * torch.randn(run.first.shape, generator=torch.Generator().manual_seed(1))
    numbers = np.array([41, 3, 17, 30, 59, 0])
    mine, theirs = (states.double() for states in problem.fit.gather(numbers, torch.device("cpu")))
    mine.requires_grad_()
    weights = run.weights.double().requires_grad_()
    offset = None if problem.student.bias is None else problem.student.bias.double()
    inputs = mine @ run.metric.inverse.double()
    found = torch.log_softmax(transform(torch.nn.functional.linear(inputs, weights, offset)), dim=-1)
    linear = torch.nn.functional.linear(theirs, problem.teacher.weight.double(), offset)
    wanted = torch.log_softmax(transform(linear), dim=-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    by_weights, by_states = torch.autograd.grad(kl, (weights, mine))
    given = run.metric.inverse, run.weights
    inputs = mine.detach().float() @ given[0]
    error = run.error(inputs, theirs.float())
    torch.testing.assert_close((error.T @ inputs).double(), by_weights, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close((error @ given[1] @ given[0]).double(), by_states, rtol=1e-3, atol=1e-6)


def test_mean_kl_is_the_mean_over_all_places_and_zero_for_the_teacher_itself() -> None:
    problem = reachable(fit=50, check=333, bias=True, transform=CAPPED)
    mine, theirs = problem.check.gather(np.arange(333), torch.device("cpu"))
    wanted = torch.log_softmax(problem.teacher.logits(theirs).double(), -1)
    found = torch.log_softmax(problem.student.logits(mine).double(), -1)
    kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert mean_kl(problem.check, problem.student, problem.teacher) == pytest.approx(kl, rel=1e-5)
    assert mean_kl(problem.check, problem.teacher, problem.teacher) == 0.0


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.0, 8.0)])
def test_a_head_that_can_become_the_teachers_does(transform: LogitTransform, tmp_path: Path) -> None:
    problem = reachable(bias=True, transform=transform)
    fitted = _run(problem, tmp_path, passes=10)
    assert fitted.kl[0] > 0.1
    assert min(fitted.kl) < 0.01 * fitted.kl[0]
    reached = mean_kl(problem.check, _changed(problem, fitted), problem.teacher)
    assert reached == pytest.approx(fitted.kl[fitted.best], rel=1e-3, abs=1e-6)


def test_a_subset_of_tokens_is_fitted_through_their_rows_alone(tmp_path: Path) -> None:
    problem = reachable(tokens=40)
    ids = np.array([0, 3, 4, 17, 28, 39])
    heads = [
        head_over_common_tokens(Head(head.weight, torch.arange(40.0), head.transform), ids)
        for head in (problem.student, problem.teacher)
    ]
    assert torch.equal(heads[0].weight, problem.student.weight[ids])
    assert heads[0].bias is not None
    assert heads[0].bias.tolist() == ids.tolist()
    part = Problem(problem.fit, problem.check, *heads)
    fitted = _run(part, tmp_path, passes=8)
    assert fitted.delta.shape == (6, 12)
    assert min(fitted.kl) < 0.05 * fitted.kl[0]


def test_a_fit_that_starts_at_the_answer_stays_there_and_one_that_starts_elsewhere_returns_all_of_it(
    tmp_path: Path,
) -> None:
    problem = reachable()
    answer = problem.teacher.weight - problem.student.weight
    fitted = fit_head(
        _source(problem), problem.student, problem.teacher, HeadFitSettings(2), tmp_path, "key", start=answer
    )
    assert fitted.kl[0] < 1e-6
    torch.testing.assert_close(fitted.delta, answer, rtol=0, atol=5e-3)
    near = fit_head(
        _source(problem), problem.student, problem.teacher, HeadFitSettings(4), tmp_path, "near", start=0.5 * answer
    )
    assert near.kl[0] < mean_kl(problem.check, problem.student, problem.teacher)
    assert mean_kl(problem.check, _changed(problem, near), problem.teacher) == pytest.approx(min(near.kl), rel=1e-2)


@pytest.mark.parametrize("passes_done", [0, 1, 3])
def test_a_killed_fit_goes_on_to_the_same_bits(passes_done: int, tmp_path: Path) -> None:
    problem, settings = reachable(fit=1024), HeadFitSettings(4)
    folder = tmp_path / "cut"
    folder.mkdir()
    whole = _run(problem, tmp_path)

    def stop(fraction: float) -> None:
        if fraction > passes_done / 4 + 0.1:
            raise KilledError

    arguments = (_source(problem), problem.student, problem.teacher, settings, folder, "key")
    with pytest.raises(KilledError):
        fit_head(*arguments, on_progress=stop)
    told: list[float] = []
    again = fit_head(*arguments, on_progress=told.append)
    assert again.resumed == passes_done
    assert min(told) > passes_done / 4
    assert len(told) == (4 - passes_done) * 8  # 1024 states in batches of 128
    assert torch.equal(again.delta, whole.delta)
    assert (again.kl, again.best, again.rate) == (whole.kl, whole.best, whole.rate)
    silent: list[float] = []
    third = fit_head(*arguments, on_progress=silent.append)
    assert third.resumed == 4
    assert silent == []
    assert torch.equal(third.delta, whole.delta)


def test_a_damaged_pass_is_set_aside_and_computed_again(tmp_path: Path) -> None:
    problem = reachable(fit=1024)
    whole = _run(problem, tmp_path)
    (part,) = tmp_path.iterdir()
    content = bytearray(part.read_bytes())
    content[-100] ^= 1
    part.write_bytes(bytes(content))
    again = _run(problem, tmp_path)
    assert again.resumed == 0
    assert torch.equal(again.delta, whole.delta)
    assert [path.name for path in tmp_path.glob("*.rejected-*")] == [f"{part.name}.rejected-1"]
    assert again.rejected == (f"{part.name}.rejected-1",)
    assert _run(problem, tmp_path).resumed == 4


def test_another_key_resumes_nothing(tmp_path: Path) -> None:
    problem = reachable(fit=512)
    first = _run(problem, tmp_path)
    other = _run(problem, tmp_path, key="other", seed=1)
    assert other.resumed == 0
    assert not torch.equal(first.delta, other.delta)


def test_a_rate_too_large_is_halved_until_the_first_pass_helps(tmp_path: Path) -> None:
    problem = reachable(fit=1024, size=0.1)
    asked = 6.0
    fitted = _run(problem, tmp_path, rate=asked)
    assert fitted.kl[1] < fitted.kl[0]
    halved = np.log2(asked / 12 / fitted.rate)
    assert halved >= 1
    assert halved == round(halved)
    assert _run(problem, tmp_path, rate=asked).rate == fitted.rate  # also where it is read from the disk


def test_where_every_pass_harms_the_untouched_head_is_the_answer(tmp_path: Path) -> None:
    problem = reachable(fit=512, size=0.02)
    fitted = _run(problem, tmp_path, rate=1e5, passes=2)
    assert fitted.best == 0
    assert fitted.rate == 1e5 / 12 / 16
    assert not fitted.delta.any()
    assert all(kl > fitted.kl[0] for kl in fitted.kl[1:])


def test_the_best_pass_counts_not_the_last(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    problem = reachable(fit=128, check=1024, width=24, tokens=60, size=0.3)
    mine, _ = problem.fit.gather(np.arange(128), torch.device("cpu"))
    noisy = mine + 1.5 * torch.randn(mine.shape, generator=generator)  # the little text misleads: overfitting harms
    overfitted = Problem(state_pairs(mine, noisy), problem.check, problem.student, problem.teacher)
    fitted = _run(overfitted, tmp_path, passes=60, rate=2.0)
    assert fitted.best == int(np.argmin(fitted.kl))
    assert 0 < fitted.best < 60
    reached = mean_kl(problem.check, _changed(problem, fitted), problem.teacher)
    assert reached == pytest.approx(min(fitted.kl), rel=1e-3)
