"""Which rank the head's pair gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_svd_distill.algebra.whitening import Whitening, whitening
from moe_svd_distill.streaming import Head
from moe_svd_distill.training.head_rank import KEPT_SHARE, SERVED_RANKS, HeadRank, RankTrial, choose_rank, head_factors
from moe_svd_distill.training.measuring import mean_kl
from tests.support.head_problems import Problem, reachable, second_moment

WIDTH = 40


def _metric(problem: Problem) -> Whitening:
    return whitening(second_moment(problem.fit))


def _choose(problem: Problem, asked: HeadRank, dtype: torch.dtype = torch.float32) -> tuple[RankTrial, ...]:
    delta = problem.teacher.weight - problem.student.weight
    untouched = mean_kl(problem.check, problem.student, problem.teacher)
    return choose_rank(delta, _metric(problem), asked, _kl(problem), untouched, dtype)


def _kl(problem: Problem, teacher: Head | None = None) -> Callable[[torch.Tensor], float]:
    """Of a change of the student's head, on the checking states."""
    return lambda change: mean_kl(problem.check, problem.student.plus(change), teacher or problem.teacher)


@pytest.fixture(scope="module")
def problem() -> Problem:
    """A change of rank 20 to a head of width 40."""
    return reachable(fit=600, check=400, tokens=70, width=WIDTH, rank=20, size=0.3)


def test_auto_takes_the_smallest_served_rank_that_keeps_enough(problem: Problem) -> None:
    trials = _choose(problem, "auto")
    assert [trial.rank for trial in trials] == [16, 32]
    assert trials[-1].rank == 32
    assert trials[0].share < KEPT_SHARE <= trials[1].share
    assert trials[1].kl == pytest.approx(0.0, abs=1e-4)


def test_auto_ends_at_the_width_where_nothing_smaller_is_enough() -> None:
    base = reachable(fit=600, check=400, tokens=70, width=WIDTH)
    random = torch.randn(70, WIDTH, generator=torch.Generator().manual_seed(0))
    even = torch.linalg.qr(random)[0] @ _metric(base).inverse
    teacher = Head(base.student.weight + 3 * even, None, base.teacher.transform)
    trials = _choose(Problem(base.fit, base.check, base.student, teacher), "auto")
    assert [trial.rank for trial in trials] == [16, 32, WIDTH]
    assert trials[-1].rank == WIDTH
    narrow = reachable(fit=300, check=100, tokens=20, width=8)
    assert [trial.rank for trial in _choose(narrow, "auto")] == [8]


def test_auto_never_exceeds_what_servers_take() -> None:
    generator = torch.Generator().manual_seed(0)
    problem = reachable(fit=700, check=64, tokens=530, width=520, size=0.2)
    delta = torch.randn(530, 520, generator=generator)
    trials = choose_rank(
        delta, Whitening(torch.eye(520), torch.eye(520)), "auto", _kl(problem, problem.student.plus(delta)), 10.0,
        torch.bfloat16,
    )  # fmt: skip
    assert trials[-1].rank in SERVED_RANKS
    assert all(trial.rank in SERVED_RANKS for trial in trials)


@pytest.mark.parametrize(("asked", "rank"), [("full", WIDTH), (5, 5), (WIDTH, WIDTH), (WIDTH + 9, WIDTH + 9)])
def test_what_is_asked_for_is_taken(problem: Problem, asked: HeadRank, rank: int) -> None:
    trials = _choose(problem, asked)
    assert trials[-1].rank == rank
    (trial,) = trials
    assert trial.rank == rank
    assert (trial.share > 0.999) == (rank >= 20)


def test_a_rank_above_the_width_is_padded_with_zeros(problem: Problem) -> None:
    delta, metric = problem.teacher.weight - problem.student.weight, _metric(problem)
    b, a = head_factors(delta, metric, WIDTH + 9, torch.float32)
    assert (b.shape, a.shape) == ((70, WIDTH + 9), (WIDTH + 9, WIDTH))
    assert not b[:, WIDTH:].any()
    assert not a[WIDTH:].any()
    torch.testing.assert_close(b @ a, delta, rtol=0, atol=1e-3)
    assert all(torch.equal(whole, part) for whole, part in zip(
        (b[:, :WIDTH], a[:WIDTH]), head_factors(delta, metric, WIDTH, torch.float32), strict=True
    ))  # fmt: skip


def test_the_trial_is_of_the_factors_as_they_are_stored(problem: Problem) -> None:
    coarse, fine = (_choose(problem, "full", dtype)[0].kl for dtype in (torch.bfloat16, torch.float32))
    assert coarse > fine
    b, a = head_factors(problem.teacher.weight - problem.student.weight, _metric(problem), WIDTH, torch.bfloat16)
    assert b.dtype == a.dtype == torch.bfloat16
    stored = problem.student.plus(b.float() @ a.float())
    assert mean_kl(problem.check, stored, problem.teacher) == coarse


def test_a_change_that_helps_nothing_keeps_all_of_nothing(problem: Problem) -> None:
    nothing = torch.zeros_like(problem.student.weight)
    untouched = mean_kl(problem.check, problem.student, problem.teacher)
    trials = choose_rank(nothing, _metric(problem), "auto", _kl(problem), untouched, torch.bfloat16)
    assert trials[-1].rank == 16
    assert trials[0].share == 1.0


def test_where_there_is_next_to_no_fall_what_is_left_is_the_measure(problem: Problem) -> None:
    noise = 0.01 * torch.randn(70, WIDTH, generator=torch.Generator().manual_seed(3))
    teacher = Head(problem.teacher.weight + noise, None, problem.teacher.transform)
    delta = problem.teacher.weight - problem.student.weight
    best = mean_kl(problem.check, problem.teacher, teacher)
    trials = choose_rank(delta, _metric(problem), "auto", _kl(problem, teacher), best * (1 + 1e-6), torch.float32)
    assert trials[0].rank == 16
    assert trials[0].share == pytest.approx(1 - (trials[0].kl - best) / (best / 10), rel=1e-3)
    assert trials[0].share < KEPT_SHARE <= trials[-1].share
