"""How a student is trained, and where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

OptimiserName: TypeAlias = Literal["muon", "adamw"]
HeadTraining: TypeAlias = Literal["whole", "fixed"]
LAST_LAYERS_RATE, HEAD_RATE = 0.6, 0.5
"""Over the width of the states: 5e-3 at 128, 3e-4 at 2048, where LoRA training commonly is."""
_STEPS, _FEWEST_PASSES, _MOST_PASSES = 2048, 4, 16
_STEP_TOKENS, _STEPS_OF_HEAD, _FEWEST_PLACES, _MOST_PLACES = 512, 256, 128, 768
_STEPS_OF_ALL_LAYERS, _SMALLEST_STEP, _LARGEST_STEP = 3072, 512, 65536
_MEASURING_SHARE, _TRAINING_COST, _FEWEST_CHECKS = 0.125, 3, 2


def step_over_little(tokens: int, *, head_alone: bool) -> int:
    """Tokens of a step over what the last layers and the head are trained on, or the head alone, which takes fewer."""
    return min(max(tokens // _STEPS_OF_HEAD, _FEWEST_PLACES), _MOST_PLACES) if head_alone else _STEP_TOKENS


def passes_over_little(asked: int | None, steps_in_pass: int) -> int:
    """Passes over what the last layers and the head are trained on: as asked, or about 2,048 steps in 4 to 16."""
    return asked or min(max(math.ceil(_STEPS / steps_in_pass), _FEWEST_PASSES), _MOST_PASSES)


def optimiser_steps(asked: int | Literal["auto"], passes: float, tokens: int, length: int) -> tuple[int, int]:
    """How many steps a training of all layers has and how many tokens one of them, for sequences of this length."""
    usual = min(max(int(passes * tokens // _STEPS_OF_ALL_LAYERS), _SMALLEST_STEP), _LARGEST_STEP)
    sequences, together = tokens // length, max(1, round((usual if asked == "auto" else asked) / length))
    return max(1, round(passes * max(1, sequences // together))), min(sequences, together) * length


def affordable_checks(asked: int, trained: int, measured: int) -> int:
    """How often the student is measured in training: as asked, or less often where that took too much of the time.

    Args:
        asked: How often.
        trained: Tokens trained on in all; each costs about three that are measured.
        measured: Tokens that are measured each time.
    """
    affordable = int(_MEASURING_SHARE * _TRAINING_COST * trained / max(1, measured))
    return min(asked, max(_FEWEST_CHECKS, affordable))


def needs_rows(fixed_head: bool, divergence: str) -> bool:
    """Whether a few numbers for each place are all that the loss needs of the teacher (`teacher_expectations`)."""
    return fixed_head and divergence == "forward"


@dataclass(frozen=True)
class TrainingSettings:
    """How a student is trained.

    Attributes:
        epochs: Passes over the text.
        step_tokens: Tokens of one step of the optimiser, over all processes.
        batch_tokens: Tokens that go through a layer together in one process.
        rate: Largest learning rate of the factors.
        head_rate: The same of the head, in whitened coordinates.
        warm_up: Share of the steps in which the rate rises; afterwards it falls to zero in a straight line.
        clip: Norm that the gradient of the factors, and that of the head, is clipped to.
        optimiser: Of the factors; the head is always moved by AdamW.
        momentum: Of Muon.
        betas: Of AdamW.
        weight_decay: Of the factors, decoupled.
        divergence: From the teacher.
        cross_entropy_share: Share of the cross-entropy with the text in the loss.
        head: Whether the head moves.
        checks: How often the student is measured on other text.
        patience: Checks in a row, none lower than the one before, after which training stops.
        halvings: How often training may begin anew at half the rate because its first check was no better than the
            start.
        seed: Of the order of the sequences.
    """

    epochs: float
    step_tokens: int
    batch_tokens: int
    rate: float
    head_rate: float
    warm_up: float = 0.02
    clip: float = 1.0
    optimiser: OptimiserName = "muon"
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    divergence: str = "forward"
    cross_entropy_share: float = 0.0
    head: HeadTraining = "whole"
    checks: int = 12
    patience: int = 4
    halvings: int = 0
    seed: int = 0

    def share_at(self, step: int, steps: int) -> float:
        """Share of the largest rate at step 1 … steps."""
        rising = max(1, math.ceil(self.warm_up * steps))
        return min(1.0, step / rising) * (1 - (step - 1) / steps)


@dataclass(frozen=True)
class Placement:
    """Where a student is trained.

    Attributes:
        resident: Whether it is in memory, or one layer of it at a time.
        devices: One for each process.
        threads: CPU threads of each process.
        dtype: Type to compute in.
        reason: Why, in words.
        memory_bytes: That a process would take in memory.
    """

    resident: bool
    devices: tuple[str, ...]
    threads: int
    dtype: str
    reason: str
    memory_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found
