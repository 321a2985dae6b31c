"""What an architecture does between its final hidden states and its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
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


def logit_transform(config: Any) -> LogitTransform:
    """The transform that a transformers configuration describes."""
    config = config.get_text_config()
    multiplier = getattr(config, "logit_scale", None) or 1.0
    multiplier /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(float(multiplier), getattr(config, "final_logit_softcapping", None))
