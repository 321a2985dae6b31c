"""What a stage on text works with, and what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_svd_distill.streaming import ScaledAdapter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from moe_svd_distill.calibration.paired import PairedText
    from moe_svd_distill.evaluation.scale_search import ScaleSearch
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.pipeline.texts import RunText
    from moe_svd_distill.recipe import Recipe


@dataclass(frozen=True, eq=False)
class StageInput:
    """What a stage on text works with.

    Attributes:
        recipe: What is asked for.
        pair: Teacher and student.
        text: From ``read_run_text``, with a part to train on.
        folder: The output's folder for parts, where training is saved.
        devices: Where to compute.
        workers: Processes to use on the CPU.
        start: The adapter to begin with; None for none.
    """

    recipe: Recipe
    pair: ModelPair
    text: RunText
    folder: Path
    devices: tuple[str, ...]
    workers: int
    start: ScaledAdapter | None

    @property
    def fit_text(self) -> PairedText:
        """The text to train on."""
        assert self.text.fit is not None
        return self.text.fit


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
class StageResult:
    """What a stage on text has made, and how it came about.

    Attributes:
        head: What has become of the head; None where it stands still.
        pairs: Hub name to ``(B, A)`` as stored, for every other matrix that was trained.
        search: The scale search on top of what was there before.
        record: Facts for run.json.
    """

    head: HeadChange | None
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    search: ScaleSearch
    record: dict[str, Any]
