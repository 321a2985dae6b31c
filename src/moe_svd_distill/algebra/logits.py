"""What an architecture does between its head and its logits, and how that bends a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to the head's output: logits = cap · tanh(multiplier · x / cap)."""

    multiplier: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply it, (tokens, vocabulary) to the same."""
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def pull_back(self, gradient: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """The gradient by the head's output from the gradient by the logits that came of it."""
        if self.cap is not None:
            gradient = gradient * (1.0 - (logits / self.cap) ** 2)
        return gradient * self.multiplier if self.multiplier != 1.0 else gradient
