"""The training loop: steps, checks on other text, saves, and the best state so far.

A run that is killed goes on from its last save and ends in the same values: the order of the sequences follows from the
seed, and everything that moves is in the save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.training.engine import Engine
from moe_svd_distill.training.fixed_head import FixedHead
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.optimiser import AdamW, Muon, Optimiser
from moe_svd_distill.training.process_group import ProcessGroup, SingleProcess
from moe_svd_distill.training.progress import Outcome, Point, Progress
from moe_svd_distill.training.saves import TrainingCheckpoints
from moe_svd_distill.training.settings import TrainingSettings
from moe_svd_distill.training.text import Batch, TrainingText

_DIVERGED = 3.0  # times the KL before training, on the checking text; large rates raise it at first, without harm


class Training:
    """One training run."""

    def __init__(
        self,
        engine: Engine,
        head: TrainedHead | FixedHead,
        text: TrainingText,
        check: TrainingText,
        settings: TrainingSettings,
        group: ProcessGroup | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            engine: The student, with its factors.
            head: Its head.
            text: To train on.
            check: To measure on.
            settings: How.
            group: The processes that share the work.
        """
        self.engine, self.bank, self.head, self.text, self.check = engine, engine.bank, head, text, check
        self.settings, self.group = settings, group or SingleProcess()
        self.device = self.bank.values.device
        self.rows = max(1, settings.step_tokens // text.length)
        self.steps_in_epoch = max(1, len(text) // self.rows)
        self.steps = max(1, round(settings.epochs * self.steps_in_epoch))
        self.optimisers = self._optimisers(settings)

    def complete(
        self,
        saves: TrainingCheckpoints | None = None,
        on_progress: Callable[[Progress, int], None] = lambda progress, steps: None,
        kl_before: float | None = None,
    ) -> Outcome:
        """Train to the end, and leave the best state in the bank and the head.

        Args:
            saves: Where the run is saved; None keeps nothing.
            on_progress: Told after each step where the run stands, and the number of steps.
            kl_before: What `measure` gives at the start, where that is known.

        Raises:
            BadDataError: It is not finite.
        """
        found = saves.load() if saves else None
        progress = Progress()
        best = [values.clone() for values in self._values()]
        if found is None:
            kl = self.measure() if kl_before is None else kl_before
            if not math.isfinite(kl):
                raise BadDataError(
                    f"KL of the untrained student on other text is {kl}, so training has nothing to begin with",
                    "Check both models, or compute in a wider type",
                )
            progress.curve.append(Point(0, 0, 0.0, None, kl, 0.0))
        else:
            tensors, record = found
            progress = Progress.from_dict(record)
            ended = progress.step == self.steps or bool(progress.ended)
            best = self._best_in(tensors) if ended else self._restore(tensors)
        resumed = progress.step
        order: tuple[int, NDArray[np.int64]] | None = None
        while progress.step < self.steps and not progress.ended:
            begin = time.monotonic()
            epoch, place = divmod(progress.step, self.steps_in_epoch)
            if order is None or order[0] != epoch:
                generator = np.random.default_rng([self.settings.seed, epoch])
                order = epoch, generator.permutation(len(self.text))
            progress.losses.append(self._step(order[1][place * self.rows : (place + 1) * self.rows], progress))
            progress.step += 1
            progress.seconds += time.monotonic() - begin
            if not math.isfinite(progress.losses[-1]):
                if self._begins_badly(progress, math.nan):
                    self._begin_anew(progress, best)
                else:
                    progress.ended = "diverged"
            elif self._due(progress.step):
                begin = time.monotonic()
                kl = self.measure()
                progress.seconds += time.monotonic() - begin
                if self._begins_badly(progress, kl):
                    self._begin_anew(progress, best)
                elif self._note(progress, kl):
                    for kept, values in zip(best, self._values(), strict=True):
                        kept.copy_(values)
            on_progress(progress, self.steps)
            ended = progress.step == self.steps or bool(progress.ended)
            if saves and (ended or saves.due(self._together)):
                saves.write(self._best_of(best) if ended else self._tensors(best), progress.as_dict())
        for values, kept in zip(self._values(), best, strict=True):
            values.copy_(kept)
        return Outcome(
            tuple(progress.curve),
            progress.best,
            self.steps,
            progress.ended or "done",
            progress.seconds,
            resumed,
            progress.halvings,
            tuple(saves.rejected) if saves else (),
        )

    @torch.no_grad()
    def measure(self) -> float:
        """Mean KL on the checking text, in nats per place."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        mine = np.arange(len(self.check))[self.group.number :: self.group.count]
        batches = self._batches(self.check, mine)
        for batch, states in zip(batches, self.engine.states(batches), strict=True):
            sums[0] += self.head.divergence(states, batch)
            sums[1] += len(states)
        self.group.add_up(sums)
        return float(sums[0] / sums[1])

    def _optimisers(self, settings: TrainingSettings) -> dict[str, tuple[Optimiser, float]]:
        """Of the factors and of the head, each with its rate, for what of them moves."""
        bank, head, found = self.bank, self.head, {}
        if bank.values.numel():
            decay = settings.weight_decay
            factors: Optimiser = (
                Muon(bank, settings.momentum, decay, self.group)
                if settings.optimiser == "muon"
                else AdamW(bank.values, bank.gradient, settings.betas, decay, bank.blocks)
            )
            found["factors"] = factors, settings.rate
        if head.values.numel():
            found["head"] = AdamW(head.values, head.gradient, settings.betas, 0.0), settings.head_rate
        return found

    def _begins_badly(self, progress: Progress, kl: float) -> bool:
        """Whether the first check is no better than the start, and the rate may still be halved."""
        first = len(progress.curve) == 1
        return first and progress.halvings < self.settings.halvings and not kl < progress.curve[0].kl

    def _begin_anew(self, progress: Progress, start: list[Tensor]) -> None:
        """Back to the start, the best so far, at half the rate."""
        progress.halvings, progress.step = progress.halvings + 1, 0
        progress.losses.clear()
        for values, first in zip(self._values(), start, strict=True):
            values.copy_(first)
        self.optimisers = self._optimisers(self.settings)

    def _step(self, rows: NDArray[np.int64], progress: Progress) -> float:
        """One step of the optimiser; returns its loss."""
        share = self.settings.share_at(progress.step + 1, self.steps) / 2**progress.halvings
        self.bank.gradient.zero_()
        self.head.gradient.zero_()
        self.head.loss.zero_()
        places = self.text.places(rows)
        self.engine.accumulate_gradients(
            self._batches(self.text, rows[self.group.number :: self.group.count]), self.head, places
        )
        self.group.add_up(self.bank.gradient, self.head.gradient, self.head.loss)
        for gradient in (self.bank.gradient, self.head.gradient):
            norm = float(gradient.norm()) if gradient.numel() else 0.0
            if norm > self.settings.clip:
                gradient.mul_(self.settings.clip / norm)
        for optimiser, rate in self.optimisers.values():
            optimiser.step(rate * share)
        return float(self.head.loss)

    def _batches(self, text: TrainingText, rows: NDArray[np.int64]) -> list[Batch]:
        together = max(1, self.settings.batch_tokens // text.length)
        return [text.take(rows[begin : begin + together], self.device) for begin in range(0, len(rows), together)]

    def _due(self, step: int) -> bool:
        """Whether the student is measured after this step."""
        checks = self.settings.checks
        return step * checks // self.steps > (step - 1) * checks // self.steps

    def _note(self, progress: Progress, kl: float) -> bool:
        """Put a point on the curve; returns whether it is the best."""
        loss = sum(progress.losses) / len(progress.losses)
        progress.losses.clear()
        tokens = progress.step * self.rows * self.text.length
        rate = self.settings.rate / 2**progress.halvings * self.settings.share_at(progress.step, self.steps)
        progress.curve.append(Point(progress.step, tokens, progress.seconds, loss, kl, rate))
        if not math.isfinite(kl) or kl > _DIVERGED * progress.curve[0].kl:
            progress.ended = "diverged"
        if kl < progress.curve[progress.best].kl:
            progress.best = len(progress.curve) - 1
            return True
        if self._checks_without_gain(progress.curve) >= self.settings.patience:
            progress.ended = progress.ended or "no more gain"
        return False

    @staticmethod
    def _checks_without_gain(curve: list[Point]) -> int:
        """Checks at the end of the curve of which none was lower than the one before."""
        falls = (later.kl < earlier.kl for earlier, later in zip(reversed(curve[:-1]), reversed(curve), strict=False))
        return sum(1 for _ in takewhile(lambda fell: not fell, falls))

    def _together(self, value: bool) -> bool:
        """Whether the first process says so: its clock counts."""
        if self.group.count == 1:
            return value
        flag = torch.tensor([float(value and self.group.number == 0)], device=self.device)
        self.group.add_up(flag)
        return bool(flag.item())

    def _values(self) -> list[Tensor]:
        return [self.bank.values, self.head.values]

    def _tensors(self, best: list[Tensor]) -> dict[str, Tensor]:
        """All that a run needs to go on."""
        tensors = {"factors": self.bank.values, "head": self.head.values} | self._best_of(best)
        for name, (optimiser, _) in self.optimisers.items():
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in optimiser.tensors().items()}
        return {name: tensor for name, tensor in tensors.items() if tensor.numel()}

    @staticmethod
    def _best_of(best: list[Tensor]) -> dict[str, Tensor]:
        """All that is needed of a run that has ended."""
        named = {"best.factors": best[0], "best.head": best[1]}
        return {name: tensor for name, tensor in named.items() if tensor.numel()}

    def _best_in(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        named = zip(("best.factors", "best.head"), self._values(), strict=True)
        return [tensors[name].to(values.device) if values.numel() else values.clone() for name, values in named]

    def _restore(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """Put a save in; returns the best state in it."""
        for values, name in ((self.bank.values, "factors"), (self.head.values, "head")):
            if values.numel():
                values.copy_(tensors[name])
        for name, (optimiser, _) in self.optimisers.items():
            prefix = f"{name}."
            kept = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            optimiser.restore(kept)
        return self._best_in(tensors)
