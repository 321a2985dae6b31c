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
FEWEST_CHECK_TOKENS, MOST_CHECK_TOKENS = 1024, 4096


@dataclass(frozen=True)
class RunText:
    """What a run reads.

    Attributes:
        search: Text the scale is searched on, which nothing else is chosen by.
        fit: Text that is fitted or trained on; None where only the weights stage runs.
        check: Text that passes, steps and the head's rank are chosen by; with `fit`, all that a fit depends on.
    """

    search: PairedText
    fit: PairedText | None
    check: PairedText | None

    @property
    def parts(self) -> Mapping[str, PairedText]:
        """By name."""
        found = {"search": self.search, "fit": self.fit, "check": self.check}
        return {name: part for name, part in found.items() if part is not None}

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

    fitting = "calibrated" in stages or "refined" in stages
    budgets = {"check": check_tokens(recipe), "fit": recipe.tokens} if fitting else {}
    budgets["search"] = recipe.scale_search_tokens  # last: more of it leaves the fit as it is
    parts = pair_text(
        read_documents(recipe.calibration, field=recipe.text_field),
        pair.teacher.checkpoint.folder,
        pair.student.checkpoint.folder,
        budgets,
        length=sequence_length(recipe, longest_sequence(pair)),
        mode=recipe.vocabulary,
        seed=recipe.seed,
    )
    return RunText(parts["search"], parts.get("fit"), parts.get("check"))


def check_tokens(recipe: Recipe) -> int:
    """Tokens that passes, steps and ranks are chosen by: a quarter of what is fitted on, within bounds."""
    return min(max(recipe.tokens // 4, FEWEST_CHECK_TOKENS), MOST_CHECK_TOKENS)


def longest_sequence(pair: ModelPair) -> int:
    """The longest sequence both models take, at most 512 tokens."""
    limits = (model.checkpoint.config.get("max_position_embeddings") for model in (pair.teacher, pair.student))
    return min([LONGEST_SEQUENCE, *(int(limit) for limit in limits if limit)])
