"""The student's head fitted to the teacher's exact distributions: a convex problem on cached states.

Minimise ``Σ_t KL(p_t ‖ softmax((W_S + Δ) x_t))`` over Δ, with x the student's final normed state, y the teacher's and
``p = softmax(W_T y)``. No model runs: one evaluation costs two matrix products. The inputs are whitened, so that one
step size suits every direction, and Δ̃ = Δ M^(1/2) is moved by minibatch steps with Adam's per-entry scaling (which
evens out common and rare tokens) and a step size that falls to zero. It reaches in four passes what whole-batch Newton
steps with a class-wise preconditioner did not reach in twelve (docs/decisions/0010). After every pass the state is on
the disk, and the best pass by KL on other text is what counts; the untouched head is one of the candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.whitening import Whitening, whitening
from moe_svd_distill.execution.parts import PartContent, find_fault, open_part, part_path, reject_part, write_part
from moe_svd_distill.fitting.pairs import HeadWeights, StatePairs, second_moment

_FIRST_MOMENT, _SECOND_MOMENT, _TINY = 0.9, 0.98, 1e-10
_LARGEST_BATCH, _SMALLEST_BATCH, _BATCHES = 768, 128, 256
_MOST_RESTARTS = 4
_CHECK_BYTES = 256 << 20


@dataclass(frozen=True)
class HeadFitSettings:
    """How the head is fitted.

    Attributes:
        passes: Passes over the states.
        rate: Largest step of an entry of Δ̃, times the width of the states: with unit inputs all moving one way, a step
            changes a logit by at most this much.
        seed: Of the order of the states.
    """

    passes: int = 6
    rate: float = 0.5
    seed: int = 0


@dataclass(frozen=True, eq=False)
class HeadFit:
    """What the fit found.

    Attributes:
        delta: Change of the head's weight, float32, (v, d).
        metric: The second moment of the student's states, as roots.
        kl: KL on the checking text before the first pass and after each, in nats per token.
        best: The pass whose change this is; 0 is no change.
        rate: The step size it ended with; smaller than asked for if that one did not lower KL in its first pass.
        resumed: Passes found on the disk.
    """

    delta: Tensor
    metric: Whitening
    kl: tuple[float, ...]
    best: int
    rate: float
    resumed: int


def fit_head(
    fit: StatePairs,
    check: StatePairs,
    student: HeadWeights,
    teacher: HeadWeights,
    settings: HeadFitSettings,
    folder: Path,
    key: str,
    *,
    start: Tensor | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> HeadFit:
    """Fit the head.

    Args:
        fit: States the head is fitted on.
        check: States of other text, by which the best pass is chosen.
        student: The student's head; where its weight lies is where the fit runs.
        teacher: The teacher's head over the same tokens.
        settings: Passes and step size.
        folder: Where the state after each pass lies.
        key: Hash of everything the fit depends on.
        start: Change of the head to begin with, (v, d); default zero.
        on_progress: Told the fraction done.
    """
    run = _Fit(fit, check, student, teacher, settings, folder, key, start)
    return run.complete(on_progress or (lambda fraction: None))


@torch.no_grad()
def mean_kl(pairs: StatePairs, student: HeadWeights, teacher: HeadWeights) -> float:
    """Mean KL(teacher ‖ student) over the common tokens, in nats per place."""
    device, size = student.weight.device, max(1, _CHECK_BYTES // (4 * len(student.weight)))
    total = 0.0
    for mine, theirs in pairs.in_order(min(size, 4096), device):
        wanted = torch.log_softmax(teacher.logits(theirs), dim=-1)
        found = torch.log_softmax(student.logits(mine), dim=-1)
        total += float((wanted.exp() * (wanted - found)).sum(dim=-1).double().sum())
    return total / len(pairs)


class _Fit:
    def __init__(
        self,
        fit: StatePairs,
        check: StatePairs,
        student: HeadWeights,
        teacher: HeadWeights,
        settings: HeadFitSettings,
        folder: Path,
        key: str,
        start: Tensor | None,
    ) -> None:
        self.fit, self.check, self.student, self.teacher = fit, check, student, teacher
        self.settings, self.folder, self.key = settings, folder, key
        self.device = student.weight.device
        self.metric = whitening(second_moment(fit, self.device))
        self.origin = student.weight @ self.metric.root
        first = student.weight if start is None else student.weight + start.to(student.weight)
        self.first = first @ self.metric.root
        self.rate = settings.rate / first.shape[1]
        self.batch = int(np.clip(len(fit) // _BATCHES, _SMALLEST_BATCH, _LARGEST_BATCH))
        self.steps = settings.passes * max(1, len(fit) // self.batch)
        self.restarts = self.resumed = self.best = 0

    @torch.no_grad()
    def complete(self, report: Callable[[float], None]) -> HeadFit:
        self.kl = [self.check_kl(self.first)]
        self.weights, self.best_weights = self.first.clone(), self.first.clone()
        self.mean, self.square = torch.zeros_like(self.first), torch.zeros_like(self.first)
        self.load()
        while len(self.kl) <= self.settings.passes:
            done = len(self.kl) - 1
            self.one_pass(done, report)
            kl = self.check_kl(self.weights)
            if done == 0 and not kl < self.kl[0] and self.restarts < _MOST_RESTARTS:
                self.restart()
                continue
            self.kl.append(kl)
            if kl < self.kl[self.best]:
                self.best, self.best_weights = len(self.kl) - 1, self.weights.clone()
            self.save()
        delta = (self.best_weights - self.origin) @ self.metric.inverse
        return HeadFit(delta, self.metric, tuple(self.kl), self.best, self.rate, self.resumed)

    def one_pass(self, number: int, report: Callable[[float], None]) -> None:
        order = np.random.default_rng([self.settings.seed, number]).permutation(len(self.fit))
        batches = max(1, len(order) // self.batch)
        for place in range(batches):
            step = number * batches + place + 1
            gradient = self.gradient(order[place * self.batch : (place + 1) * self.batch])
            self.mean.mul_(_FIRST_MOMENT).add_(gradient, alpha=1 - _FIRST_MOMENT)
            self.square.mul_(_SECOND_MOMENT).addcmul_(gradient, gradient, value=1 - _SECOND_MOMENT)
            size = self.rate * (1 - step / self.steps) / (1 - _FIRST_MOMENT**step)
            scale = (self.square / (1 - _SECOND_MOMENT**step)).sqrt_().add_(_TINY)
            self.weights.addcdiv_(self.mean, scale, value=-size)
            report((number + (place + 1) / batches) / self.settings.passes)

    def gradient(self, numbers: Any) -> Tensor:
        """Of the mean KL by Δ̃ over one batch, (v, d)."""
        mine, theirs = self.fit.gather(numbers, self.device)
        inputs = mine @ self.metric.inverse
        logits = HeadWeights(self.weights, self.student.bias, self.student.transform).logits(inputs)
        error = torch.softmax(logits, dim=-1).sub_(torch.softmax(self.teacher.logits(theirs), dim=-1))
        return self.student.transform.pull_back(error, logits).T @ inputs / len(inputs)

    def check_kl(self, weights: Tensor) -> float:
        head = HeadWeights(weights @ self.metric.inverse, self.student.bias, self.student.transform)
        return mean_kl(self.check, head, self.teacher)

    def restart(self) -> None:
        self.restarts += 1
        self.rate /= 2
        self.weights.copy_(self.first)
        self.mean.zero_()
        self.square.zero_()

    def name(self, passes: int) -> str:
        return f"{self.key}-pass-{passes}"

    def save(self) -> None:
        passes = len(self.kl) - 1
        tensors = {"weights": self.weights, "best": self.best_weights, "mean": self.mean, "square": self.square}
        record = {"kl": self.kl, "best": self.best, "rate": self.rate}
        write_part(self.folder, self.name(passes), PartContent(tensors, record))
        part_path(self.folder, self.name(passes - 1)).unlink(missing_ok=True)

    def load(self) -> None:
        from moe_svd_distill.execution.parts import read_record

        for passes in range(self.settings.passes, 0, -1):
            path = part_path(self.folder, self.name(passes))
            if not path.is_file():
                continue
            if find_fault(path, self.name(passes)) is not None:
                reject_part(path)
                continue
            record = read_record(path)
            with open_part(path) as stored:
                self.weights.copy_(stored["weights"])
                self.best_weights.copy_(stored["best"])
                self.mean.copy_(stored["mean"])
                self.square.copy_(stored["square"])
            self.kl, self.best, self.rate = list(record["kl"]), int(record["best"]), float(record["rate"])
            self.resumed = passes
            return
