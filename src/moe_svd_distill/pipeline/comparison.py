"""Two models side by side, how they are related, and what ``method: auto`` makes of it, as plain JSON types."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moe_svd_distill.pairing.lineage import MethodChoice, Relatedness, choose_method
from moe_svd_distill.pipeline.method import automatic_choice, stages_for
from moe_svd_distill.pipeline.pair import Model, open_pair
from moe_svd_distill.pipeline.relatedness import measure_relatedness, weights_at_hand
from moe_svd_distill.recipe import Recipe


def compare_models(teacher: str, student: str) -> dict[str, Any]:
    """Sizes, relatedness and the automatic choice with text and without. Of a hub model nothing large is fetched.

    Raises:
        DistillError: A model cannot be opened.
    """
    with open_pair(teacher, student, headers_only=True) as pair:
        relatedness = measure_relatedness(pair, sample_weights=weights_at_hand(pair))
        return {
            "teacher": sizes(pair.teacher),
            "student": sizes(pair.student),
            "relatedness": relatedness.as_dict(),
            "method": {
                "with_text": choice_as_dict(choose_method(relatedness, has_text=True)),
                "without_text": choice_as_dict(choose_method(relatedness, has_text=False)),
            },
        }


def sizes(model: Model) -> dict[str, Any]:
    """Family, sizes and bytes of one model."""
    layout, checkpoint = model.layout, model.checkpoint
    return {
        "model": checkpoint.source,
        "family": layout.model_type,
        **asdict(layout.geometry),
        "tensors": len(checkpoint),
        "bytes": checkpoint.total_bytes,
    }


def choice_as_dict(choice: MethodChoice) -> dict[str, Any]:
    """Stages and reason."""
    return {"stages": list(choice.stages), "reason": choice.reason}


def outlook_of_method(recipe: Recipe, relatedness: Relatedness) -> dict[str, Any]:
    """What was asked for beside what ``auto`` would choose.

    Raises:
        MissingInputError: The start is neither a stage nor the folder of an adapter.
    """
    found = stages_for(recipe, relatedness)
    return {
        "asked": recipe.method,
        "auto": choice_as_dict(automatic_choice(recipe, relatedness)),
        "stages": list(found.names),
        "start": None if found.start is None else str(found.start),
    }
