"""The calibration text of a run, divided and tokenised for both models, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_svd_distill.pipeline.pair import ModelPair
from moe_svd_distill.pipeline.steps import sequence_length
from moe_svd_distill.recipe import Recipe

if TYPE_CHECKING:
    from moe_svd_distill.calibration.paired import PairedText

LONGEST_SEQUENCE = 512


@dataclass(frozen=True)
class RunText:
    """What a run reads.

    Attributes:
        search: Text the scale is searched on.
        fit: Text the head is fitted on; None without the calibrated stage.
    """

    search: PairedText
    fit: PairedText | None

    @property
    def parts(self) -> Mapping[str, PairedText]:
        """By name."""
        return {"search": self.search} | ({} if self.fit is None else {"fit": self.fit})

    @property
    def used_documents(self) -> list[str]:
        """Digests of everything read, which an evaluation has to leave out."""
        return sorted({digest for part in self.parts.values() for digest in part.student.digests})

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return {
            name: {
                "tokens_asked": part.student.asked,
                "tokens": part.student.tokens,
                "documents": len(part.student.sources),
                "sequence_length": part.student.length,
                "documents_skipped": part.student.skipped,
                "places_compared": round(part.aligned, 4),
                "common_tokens": len(part.student_ids),
            }
            for name, part in self.parts.items()
        }

    def shortfalls(self) -> list[str]:
        """What was asked for and could not be had, in words."""
        return [
            f"{name} text: {part.student.tokens:,} tokens instead of the {part.student.asked:,} asked for; the "
            "calibration text has no more"
            for name, part in self.parts.items()
            if part.student.short
        ]


def read_run_text(recipe: Recipe, pair: ModelPair, stages: Sequence[str]) -> RunText:
    """Read, divide and tokenise the calibration text for a run with these stages.

    Raises:
        MissingInputError: A text is not there.
        BadDataError: There is too little text.
        IncompatiblePairError: The models have different vocabularies, and the recipe does not say ``shared``.
    """
    from moe_svd_distill.calibration.paired import pair_text
    from moe_svd_distill.calibration.text import read_documents

    budgets = {"search": recipe.scale_search_tokens}
    if "calibrated" in stages or "refined" in stages:
        budgets["fit"] = recipe.tokens
    parts = pair_text(
        read_documents(recipe.calibration, field=recipe.text_field),
        pair.teacher.checkpoint.folder,
        pair.student.checkpoint.folder,
        budgets,
        length=sequence_length(recipe, longest_sequence(pair)),
        mode=recipe.vocabulary,
        seed=recipe.seed,
    )
    return RunText(parts["search"], parts.get("fit"))


def longest_sequence(pair: ModelPair) -> int:
    """The longest sequence both models take, at most 512 tokens."""
    limits = (model.checkpoint.config.get("max_position_embeddings") for model in (pair.teacher, pair.student))
    return min([LONGEST_SEQUENCE, *(int(limit) for limit in limits if limit)])
