"""The training loop: steps, checks on other text, saves, and the best state so far.

A run that is killed goes on from its last save and ends in the same values: the order of the sequences follows from the
seed, and everything that moves is in the save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.training.engine import Engine
from moe_svd_distill.training.fixed_head import FixedHead
from moe_svd_distill.training.head import TrainedHead
from moe_svd_distill.training.optimiser import make_optimisers
from moe_svd_distill.training.process_group import ProcessGroup, as_the_first_says
from moe_svd_distill.training.progress import Point, Progress, TrainingCheckpoints
from moe_svd_distill.training.settings import TrainingSettings
from moe_svd_distill.training.text import TrainingText


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
        self.settings, self.group = settings, group or ProcessGroup()
        self.device = self.bank.values.device
        self.rows = max(1, settings.step_tokens // text.length)
        self.steps_in_epoch = max(1, len(text) // self.rows)
        self.steps = max(1, round(settings.epochs * self.steps_in_epoch))
        moving = {"factors": self.bank.values, "head": head.values}
        self.values = {name: values for name, values in moving.items() if values.numel()}
        self.optimisers = make_optimisers(self.bank, head, settings, self.group)
        self._order: tuple[int, NDArray[np.int64]] = -1, np.empty(0, dtype=np.int64)

    def complete(
        self,
        saves: TrainingCheckpoints | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        kl_before: float | None = None,
    ) -> Progress:
        """Train to the end, and leave the best state in the bank and the head.

        Args:
            saves: Where the run is saved; None keeps nothing.
            on_progress: Told after each step where the run stands.
            kl_before: What `measure` gives at the start, where that is known.

        Raises:
            BadDataError: It is not finite.
        """
        found = saves.load() if saves else None
        progress = self._begin(kl_before) if found is None else Progress.of_save(found[1], self.steps)
        best = self._restore(found[0], progress.over) if found else {k: kept.clone() for k, kept in self.values.items()}
        progress.rejected = list(saves.rejected) if saves else []
        while not progress.over:
            begin = time.monotonic()
            loss, kl = self._step(progress), None
            progress.losses.append(loss)
            progress.step += 1
            if not math.isfinite(loss):
                kl = math.nan
            elif self._due(progress.step):
                kl = self.measure()
            progress.seconds += time.monotonic() - begin
            if kl is not None and progress.begins_badly(kl, self.settings.halvings):
                progress.begin_anew()
                self._put(best)  # the start
                self.optimisers = make_optimisers(self.bank, self.head, self.settings, self.group)
            elif not math.isfinite(loss):
                progress.ended = "diverged"
            elif kl is not None and self._note(progress, kl):
                for name, values in self.values.items():
                    best[name].copy_(values)
            on_progress(progress)
            if saves and (progress.over or as_the_first_says(self.group, saves.due(), self.device)):
                saves.write(self._tensors(best, progress.over), progress.record())
        self._put(best)
        progress.ended = progress.ended or "done"
        return progress

    @torch.no_grad()
    def measure(self) -> float:
        """Mean KL on the checking text, in nats per place."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        mine = np.arange(len(self.check))[self.group.number :: self.group.count]
        batches = self.check.batches(self.settings.batch_tokens, self.device, mine)
        for batch, states in zip(batches, self.engine.states(batches), strict=True):
            sums[0] += self.head.divergence(states, batch)
            sums[1] += len(states)
        self.group.add_up(sums)
        return float(sums[0] / sums[1])

    def _begin(self, kl_before: float | None) -> Progress:
        kl = self.measure() if kl_before is None else kl_before
        if not math.isfinite(kl):
            raise BadDataError(
                f"KL of the untrained student on other text is {kl}, so training has nothing to begin with",
                "Check both models, or compute in a wider type",
            )
        return Progress(self.steps, curve=[Point(0, 0, 0.0, None, kl, 0.0)])

    def _step(self, progress: Progress) -> float:
        """One step of the optimiser; returns its loss."""
        bank, head, rows = self.bank, self.head, self._rows_of(progress.step)
        bank.gradient.zero_()
        head.gradient.zero_()
        head.loss.zero_()
        mine = rows[self.group.number :: self.group.count]
        batches = self.text.batches(self.settings.batch_tokens, self.device, mine)
        self.engine.accumulate_gradients(batches, head, self.text.places(rows))
        self.group.add_up(bank.gradient, head.gradient, head.loss)
        for gradient in (bank.gradient, head.gradient):
            norm = float(gradient.norm()) if gradient.numel() else 0.0
            if norm > self.settings.clip:
                gradient.mul_(self.settings.clip / norm)
        share = self.settings.share_at(progress.step + 1, self.steps) / 2**progress.halvings
        for optimiser, rate in self.optimisers.values():
            optimiser.step(rate * share)
        return float(head.loss)

    def _rows_of(self, step: int) -> NDArray[np.int64]:
        """The sequences of a step: each epoch has its own order."""
        epoch, place = divmod(step, self.steps_in_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.text))
        return self._order[1][place * self.rows : (place + 1) * self.rows]

    def _due(self, step: int) -> bool:
        """Whether the student is measured after this step."""
        checks = self.settings.checks
        return step * checks // self.steps > (step - 1) * checks // self.steps

    def _note(self, progress: Progress, kl: float) -> bool:
        rate = self.settings.rate / 2**progress.halvings * self.settings.share_at(progress.step, self.steps)
        return progress.note(kl, progress.step * self.rows * self.text.length, rate, self.settings.patience)

    def _put(self, found: dict[str, Tensor]) -> None:
        for name, values in self.values.items():
            values.copy_(found[name])

    def _tensors(self, best: dict[str, Tensor], over: bool) -> dict[str, Tensor]:
        """All that a run needs to go on; of one that is over the best state is enough."""
        kept = {f"best.{name}": tensor for name, tensor in best.items()}
        if over:
            return kept
        moments = {
            f"{name}.{kind}": tensor
            for name, (optimiser, _) in self.optimisers.items()
            for kind, tensor in optimiser.tensors().items()
        }
        return self.values | kept | moments

    def _restore(self, tensors: dict[str, Tensor], over: bool) -> dict[str, Tensor]:
        """Put a save in; returns the best state in it."""
        if not over:
            self._put(tensors)
            for name, (optimiser, _) in self.optimisers.items():
                own = {key.removeprefix(f"{name}."): it for key, it in tensors.items() if key.startswith(f"{name}.")}
                optimiser.restore(own)
        return {name: tensors[f"best.{name}"].to(values.device) for name, values in self.values.items()}
