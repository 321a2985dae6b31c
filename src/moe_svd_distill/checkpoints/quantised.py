"""Refusing a quantised checkpoint where its numbers alone are not enough."""

from __future__ import annotations

from moe_svd_distill.checkpoints.checkpoint import Checkpoint
from moe_svd_distill.checkpoints.quantisation.declared import USE_PLAIN
from moe_svd_distill.errors import BadDataError


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise if the model is quantised: for work that writes its weights again in the form they are stored in."""
    if checkpoint.quantisation is not None:
        raise BadDataError(f"{checkpoint.source} is quantised ({checkpoint.quantisation})", USE_PLAIN)
