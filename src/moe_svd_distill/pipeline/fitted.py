"""What a stage on text hands over: pairs of the layers, the head's change, and how far they are to be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.evaluation.scale_search import ScaleSearch


@dataclass(frozen=True, eq=False)
class HeadChange:
    """A change of the head.

    Attributes:
        factors: ``(B, A)`` as stored, (V, r) and (r, d).
        delta: Their product, float32, (V, d).
    """

    factors: tuple[Tensor, Tensor]
    delta: Tensor


@dataclass(frozen=True, eq=False)
class Fitted:
    """Fitted or trained pairs and how they came about.

    Attributes:
        head: What has become of the head; None where it stands still.
        pairs: Hub name to ``(B, A)`` as stored, for every other matrix that was fitted or trained.
        search: The scale search on top of what was there before.
        record: Facts for run.json.
    """

    head: HeadChange | None
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    search: ScaleSearch
    record: dict[str, Any]
