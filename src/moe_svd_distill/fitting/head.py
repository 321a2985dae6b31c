"""The student's head fitted to the teacher's exact distributions: a convex problem on cached states.

Minimise ``Σ_t KL(p_t ‖ softmax((W_S + Δ) x_t))`` over Δ, with x the student's final normed state, y the teacher's and
``p = softmax(W_T y)``. No model runs: one evaluation costs two matrix products. The inputs are whitened, so that one
step size suits every direction, and Δ̃ = Δ M^(1/2) is moved by minibatch steps with Adam's per-entry scaling (which
evens out common and rare tokens) and a step size that falls to zero. It reaches in four passes what whole-batch Newton
steps with a class-wise preconditioner did not reach in twelve (docs/decisions/0010). After every pass the state is on
the disk, and the best pass by KL on other text is what counts; the untouched head is one of the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_svd_distill.algebra.optimiser_steps import adam_step
from moe_svd_distill.algebra.whitening import Whitening, whitening
from moe_svd_distill.execution.parts import (
    PartContent,
    find_fault,
    open_part,
    part_path,
    read_record,
    reject_part,
    write_part,
)
from moe_svd_distill.fitting.check import mean_kl
from moe_svd_distill.fitting.source import Source
from moe_svd_distill.streaming import Head

_MOST_RESTARTS = 4
_STEPS, _FEWEST_PASSES, _MOST_PASSES = 2048, 4, 16


@dataclass(frozen=True)
class HeadFitSettings:
    """How the head is fitted.

    Attributes:
        passes: Passes over the states; None for about 2,048 steps in 4 to 16 passes.
        rate: Largest step of an entry of Δ̃, times the width of the states: with unit inputs all moving one way, a step
            changes a logit by at most this much.
        seed: Of the order of the states.
    """

    passes: int | None = None
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
        rejected: Damaged passes that were moved aside, by name of the file.
    """

    delta: Tensor
    metric: Whitening
    kl: tuple[float, ...]
    best: int
    rate: float
    resumed: int
    rejected: tuple[str, ...] = ()


def passes_of_fit(asked: int | None, batches: int) -> int:
    """Passes over the states.

    Args:
        asked: As `HeadFitSettings.passes`.
        batches: Steps of a pass.
    """
    return asked or min(max(math.ceil(_STEPS / batches), _FEWEST_PASSES), _MOST_PASSES)


def fit_head(
    source: Source,
    student: Head,
    teacher: Head,
    settings: HeadFitSettings,
    folder: Path,
    key: str,
    *,
    start: Tensor | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> HeadFit:
    """Fit the head, and what the source moves with it.

    Args:
        source: States to fit on and to check by.
        student: The student's head; where its weight lies is where the fit runs.
        teacher: The teacher's head over the same tokens.
        settings: Passes and step size.
        folder: Where the state after each pass lies.
        key: Hash of everything the fit depends on.
        start: Change of the head to begin with, (v, d); default zero.
        on_progress: Told the fraction done.
    """
    return _Fit(source, student, teacher, settings, folder, key, start).complete(on_progress or (lambda fraction: None))


class _Fit:
    def __init__(
        self,
        source: Source,
        student: Head,
        teacher: Head,
        settings: HeadFitSettings,
        folder: Path,
        key: str,
        start: Tensor | None,
    ) -> None:
        self.source, self.student, self.teacher = source, student, teacher
        self.settings, self.folder, self.key = settings, folder, key
        self.device = student.weight.device
        self.metric = whitening(source.moment(self.device))
        self.origin = student.weight @ self.metric.root
        first = student.weight if start is None else student.weight + start.to(student.weight)
        self.first = first @ self.metric.root
        self.rate = settings.rate / first.shape[1]
        self.passes = passes_of_fit(settings.passes, source.batches)
        self.steps = self.passes * source.batches
        self.restarts = self.resumed = self.best = 0
        self.rejected: list[str] = []

    @torch.no_grad()
    def complete(self, report: Callable[[float], None]) -> HeadFit:
        self.kl = [self.check_kl(self.first)]
        self.weights = self.first.clone()
        self.mean, self.square = torch.zeros_like(self.first), torch.zeros_like(self.first)
        self.best_state = self.snapshot()
        self.load()
        while len(self.kl) <= self.passes:
            done = len(self.kl) - 1
            self.one_pass(done, report)
            kl = self.check_kl(self.weights)
            if done == 0 and not kl < self.kl[0] and self.restarts < _MOST_RESTARTS:
                self.restart()
                continue
            self.kl.append(kl)
            if kl < self.kl[self.best]:
                self.best, self.best_state = len(self.kl) - 1, self.snapshot()
            self.save()
        self.restore(self.best_state)
        delta = (self.weights - self.origin) @ self.metric.inverse
        rejected = tuple(self.rejected)
        return HeadFit(delta, self.metric, tuple(self.kl), self.best, self.rate, self.resumed, rejected)

    def one_pass(self, number: int, report: Callable[[float], None]) -> None:
        order = self.source.order(np.random.default_rng([self.settings.seed, number]))
        batches = self.source.batches
        for place in range(batches):
            step = number * batches + place + 1
            share = 1 - (step - 1) / self.steps
            mine, theirs = self.source.begin(order, place)
            inputs = mine.detach() @ self.metric.inverse
            error = self.error(inputs, theirs)
            before = self.weights

            def by_states(error: Tensor = error, before: Tensor = before) -> Tensor:
                return (error @ before) @ self.metric.inverse

            self.source.end(by_states, step, share)
            gradient = error.T @ inputs
            adam_step(self.weights, gradient, self.mean, self.square, self.rate * share, step)
            report((number + (place + 1) / batches) / self.passes)

    def error(self, inputs: Tensor, theirs: Tensor) -> Tensor:
        """Gradient of the mean KL by the output of the head, (b, v), from whitened states."""
        logits = replace(self.student, weight=self.weights).logits(inputs)
        error = torch.softmax(logits, dim=-1).sub_(torch.softmax(self.teacher.logits(theirs), dim=-1))
        return self.student.transform.pull_back(error, logits).div_(len(inputs))

    def check_kl(self, weights: Tensor) -> float:
        head = replace(self.student, weight=weights @ self.metric.inverse)
        return mean_kl(self.source.check(), head, self.teacher)

    def restart(self) -> None:
        self.restarts += 1
        self.rate /= 2
        self.source.reset(self.restarts)
        self.weights.copy_(self.first)
        self.mean.zero_()
        self.square.zero_()

    def live(self) -> dict[str, Tensor]:
        """Everything that moves."""
        own = {"weights": self.weights, "mean": self.mean, "square": self.square}
        return own | {f"source.{name}": tensor for name, tensor in self.source.tensors().items()}

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.live().items() if not _is_moment(name)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.live().items():
            if name in state:
                tensor.copy_(state[name])
        self.source.settle()

    def name(self, passes: int) -> str:
        return f"{self.key}-pass-{passes}"

    def save(self) -> None:
        passes = len(self.kl) - 1
        tensors = self.live() | {f"best.{name}": tensor for name, tensor in self.best_state.items()}
        record = {"kl": self.kl, "best": self.best, "rate": self.rate, "restarts": self.restarts}
        write_part(self.folder, self.name(passes), PartContent(tensors, record))
        part_path(self.folder, self.name(passes - 1)).unlink(missing_ok=True)

    def load(self) -> None:
        for passes in range(self.passes, 0, -1):
            path = part_path(self.folder, self.name(passes))
            if not path.is_file():
                continue
            if find_fault(path, self.name(passes)) is not None:
                self.rejected.append(reject_part(path).name)
                continue
            record = read_record(path)
            self.restarts = int(record["restarts"])
            self.source.reset(self.restarts)
            with open_part(path) as stored:
                self.restore({name: stored[name] for name in stored})
                prefix = "best."
                self.best_state = {
                    name.removeprefix(prefix): stored[name].clone().to(self.device)
                    for name in stored
                    if name.startswith(prefix)
                }
            self.kl, self.best, self.rate = list(record["kl"]), int(record["best"]), float(record["rate"])
            self.resumed = passes
            return


def _is_moment(name: str) -> bool:
    return name in ("mean", "square") or name.endswith((".mean", ".square"))
