"""What the lab trains: every model's shape, seed and number of training tokens, in the order of training.

The text, the tokenizer and these specifications determine the weights up to the arithmetic of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LAB = Path(__file__).resolve().parent
WORK = LAB / ".work"
MODELS = LAB / "models"
TEXT = LAB / "text"
PAIRS = LAB / "pairs.yaml"

VOCABULARY = 2048
CONTEXT = 256
END_OF_TEXT = "<|endoftext|>"
THREADS = 2


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one model is trained."""

    tokens: int
    peak_rate: float = 2e-3
    batch: int = 8
    warm_up: float = 0.04
    floor: float = 0.1
    seed: int = 0

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.tokens // (self.batch * CONTEXT)


@dataclass(frozen=True)
class ModelSpec:
    """One model: its architecture, where its weights start from and how it is trained.

    `cropped_from` names a trained model that is cut down to the shape of this one.
    `branch_of` names a model whose state after the fraction `branch_at` of its training is taken over, with its
    optimiser, and trained for `schedule.tokens` more while the learning rate falls linearly to its floor; with no
    tokens more, that state itself is the model.
    `snapshots` are the fractions of training after which the state is kept for such branches.
    """

    name: str
    architecture: str
    schedule: Schedule
    initial_seed: int = 0
    cropped_from: str | None = None
    branch_of: str | None = None
    branch_at: float = 0.0
    snapshots: tuple[float, ...] = ()


SPECS: tuple[ModelSpec, ...] = (
    ModelSpec(
        "qwen3-moe-teacher",
        "qwen3-moe-large",
        Schedule(tokens=2_400_000, seed=11),
        initial_seed=101,
        snapshots=(0.35, 0.5, 0.55, 0.6),
    ),
    ModelSpec("qwen3-moe-independent", "qwen3-moe-small", Schedule(tokens=1_200_000, seed=22), initial_seed=202),
    ModelSpec(
        "qwen3-moe-pruned", "qwen3-moe-small", Schedule(tokens=250_000, seed=33), cropped_from="qwen3-moe-teacher"
    ),
    ModelSpec(
        "qwen3-moe-sibling",
        "qwen3-moe-large",
        Schedule(tokens=0, seed=11),
        initial_seed=101,
        branch_of="qwen3-moe-teacher",
        branch_at=0.55,
    ),
    ModelSpec("llama-teacher", "llama-large", Schedule(tokens=2_000_000, seed=44), initial_seed=404),
    ModelSpec("llama-student", "llama-small", Schedule(tokens=1_250_000, seed=55), initial_seed=505),
)


def spec_named(name: str) -> ModelSpec:
    """Return the specification called `name`."""
    for spec in SPECS:
        if spec.name == name:
            return spec
    raise KeyError(f"no model called {name!r}; there are {', '.join(spec.name for spec in SPECS)}")
