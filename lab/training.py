"""Training of one small model, reproducibly: packed sequences, AdamW, warm-up and cosine, fixed seeds and threads.

Routers are trained by the cross-entropy alone, without a loss that balances the experts: over these few tokens the
experts stay in use, unevenly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lab.plan import CONTEXT, THREADS, Schedule

_REPORT_SECONDS = 20.0


@dataclass(frozen=True)
class Snapshot:
    """A state of training: weights, optimiser, and how far the training had come."""

    weights: dict[str, torch.Tensor]
    optimiser: dict[str, Any]
    step: int
    rate: float

    def save(self, path: Path) -> None:
        """Write the state to a file, whole or not at all."""
        partial = path.with_suffix(".partial")
        torch.save(vars(self), partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read a state from a file."""
        return cls(**torch.load(path, weights_only=True))


def be_deterministic() -> None:
    """Fix the number of threads, and refuse operations whose result varies from run to run."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)


def batches(tokens: np.ndarray, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of packed sequences, (batch, CONTEXT), in an order drawn from `seed`, epoch after epoch."""
    windows = len(tokens) // CONTEXT
    packed = tokens[: windows * CONTEXT].reshape(windows, CONTEXT)
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(windows)
        for start in range(0, windows - batch + 1, batch):
            yield torch.from_numpy(packed[order[start : start + batch]].astype(np.int64))


def cosine_rate(schedule: Schedule, step: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to the floor."""
    warm = max(1, round(schedule.warm_up * schedule.steps))
    if step < warm:
        return schedule.peak_rate * (step + 1) / warm
    progress = (step - warm) / max(1, schedule.steps - warm)
    return schedule.peak_rate * (schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def falling_rate(start: float, schedule: Schedule, step: int) -> float:
    """Learning rate of a branch's step: linear from where the trunk stood down to the floor."""
    return start * (1 - (1 - schedule.floor) * (step + 1) / schedule.steps)


def _optimiser(model: PreTrainedModel) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)


def train(
    model: PreTrainedModel,
    tokens: np.ndarray,
    schedule: Schedule,
    *,
    branch: Snapshot | None = None,
    snapshots: dict[int, Path] | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Train `model` in place for the tokens of `schedule`; with `branch`, go on from that state.

    `snapshots` says after which steps the state is written to which file.
    """
    optimiser = _optimiser(model)
    stream = batches(tokens, schedule.batch, schedule.seed)
    if branch is not None:
        model.load_state_dict(branch.weights)
        optimiser.load_state_dict(branch.optimiser)
        for _ in range(branch.step):
            next(stream)
    model.train()
    began = last = time.monotonic()
    smooth = 0.0
    for step in range(schedule.steps):
        rate = cosine_rate(schedule, step) if branch is None else falling_rate(branch.rate, schedule, step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        sequences = next(stream)
        output = model(input_ids=sequences, labels=sequences)
        optimiser.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        done = step + 1
        smooth += (output.loss.item() - smooth) / min(done, 20)
        if snapshots is not None and done in snapshots:
            Snapshot(model.state_dict(), optimiser.state_dict(), done, rate).save(snapshots[done])
        now = time.monotonic()
        if now - last > _REPORT_SECONDS or done == schedule.steps:
            last = now
            left = (now - began) / done * (schedule.steps - done)
            speed = done * schedule.batch * CONTEXT / (now - began)
            report(
                f"step {done}/{schedule.steps}  loss {smooth:.3f}  rate {rate:.1e}  "
                f"{speed:,.0f} tokens/s  {left / 60:.1f} min left"
            )
    model.eval()
