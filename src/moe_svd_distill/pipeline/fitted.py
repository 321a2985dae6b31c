"""What a stage on text hands over: pairs of the layers, the head's change, and how far they are to be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.evaluation.scale_search import ScaleSearch


@dataclass(frozen=True, eq=False)
class Fitted:
    """Fitted or trained pairs and how they came about.

    Attributes:
        factors: ``(B, A)`` of the head as stored, (V, r) and (r, d).
        delta: Their product, float32, (V, d).
        pairs: Hub name to ``(B, A)`` as stored, for every other matrix that was fitted or trained.
        search: The scale search on top of what was there before.
        record: Facts for run.json.
    """

    factors: tuple[Tensor, Tensor]
    delta: Tensor
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    search: ScaleSearch
    record: dict[str, Any]
