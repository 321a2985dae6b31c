"""The logit transform that a model's configuration describes."""

from __future__ import annotations

from typing import Any

from moe_svd_distill.algebra.logits import LogitTransform

__all__ = ["LogitTransform", "logit_transform"]


def logit_transform(config: Any) -> LogitTransform:
    """The transform that a transformers configuration describes."""
    config = config.get_text_config()
    multiplier = getattr(config, "logit_scale", None) or 1.0
    multiplier /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(float(multiplier), getattr(config, "final_logit_softcapping", None))
