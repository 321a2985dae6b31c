"""Which stages a run has: what was asked for, or what the relatedness of the pair recommends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_svd_distill.errors import NothingToTransferError, UsageError
from moe_svd_distill.pairing.lineage import Lineage, Relatedness, choose_method
from moe_svd_distill.pipeline.pair import ModelPair
from moe_svd_distill.pipeline.relatedness import measure_relatedness
from moe_svd_distill.recipe import Recipe


@dataclass(frozen=True)
class Stages:
    """The stages of a run.

    Attributes:
        names: ``weights``, ``calibrated``, in order.
        reason: Why, in a sentence.
        relatedness: What was measured.
    """

    names: tuple[str, ...]
    reason: str
    relatedness: Relatedness

    @property
    def weights(self) -> bool:
        """Whether the weight difference is projected."""
        return "weights" in self.names

    @property
    def calibrated(self) -> bool:
        """Whether the head is fitted on text."""
        return "calibrated" in self.names

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return {"stages": list(self.names), "reason": self.reason, "relatedness": self.relatedness.as_dict()}


def choose_stages(recipe: Recipe, pair: ModelPair) -> Stages:
    """Measure the pair and decide.

    Raises:
        UsageError: A pair is asked for a head that is tied to the embeddings.
        NothingToTransferError: ``auto`` finds nothing worth running.
    """
    if "calibrated" in recipe.method:
        _refuse_pair_of_tied_head(recipe, pair)
    relatedness = measure_relatedness(pair)
    if recipe.method != "auto":
        return Stages(tuple(recipe.method.split("+")), f"asked for: method {recipe.method}", relatedness)
    choice = choose_method(
        relatedness,
        has_text=bool(recipe.calibration) and recipe.head == "delta",
        shared=recipe.vocabulary == "shared",
    )
    if not choice.stages:
        action = (
            "Choose a teacher that differs from the student"
            if relatedness.lineage is Lineage.SAME
            else "Give calibration text with vocabulary: shared, choose a pair with one tokenizer, or ask for a method"
        )
        raise NothingToTransferError(choice.reason, action)
    if "calibrated" in choice.stages:
        _refuse_pair_of_tied_head(recipe, pair)
    return Stages(choice.stages, choice.reason, relatedness)


def _refuse_pair_of_tied_head(recipe: Recipe, pair: ModelPair) -> None:
    if recipe.head_format == "pair" and pair.student.layout.geometry.tied_embeddings:
        raise UsageError(
            "head_format: pair, but the student ties its head to its embeddings: merged, a pair would change both",
            "Leave head_format at auto, which then saves the head whole",
        )
