"""The scale search on calibration text, as the pipeline uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter import parse_key
from moe_svd_distill.evaluation.adapted import GROUPS, AdaptedStudent, group_of
from moe_svd_distill.evaluation.loading import load_model, require_memory

if TYPE_CHECKING:
    from moe_svd_distill.calibration.text import TokenizedText
    from moe_svd_distill.pipeline.pair import ModelPair
    from moe_svd_distill.recipe import Recipe

LONGEST_SEQUENCE = 512


@dataclass(frozen=True)
class ScaleDecision:
    """What the search decided.

    Attributes:
        scales: Group to the factor on its deltas.
        transferred: Whether the adapter measurably helps on calibration text; None where nothing was measured.
        text: The decision in a sentence or two for people.
        details: Everything that was tried, for the record.
    """

    scales: Mapping[str, float]
    transferred: bool | None
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def keep(cls) -> ScaleDecision:
        """No change of scale."""
        return cls(dict.fromkeys(GROUPS, 1.0), None, "")

    @property
    def changes(self) -> bool:
        """Whether any scale differs from 1."""
        return any(scale != 1.0 for scale in self.scales.values())

    def factor_of(self, key: str) -> float:
        """The factor on the B matrix with this key of the adapter."""
        return self.scales.get(group_of(parse_key(key)[0]), 1.0)

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return {**self.details, "scales": dict(self.scales), "decision": self.text}


def not_searched(reason: str) -> ScaleDecision:
    """The decision where there is nothing to decide by."""
    text = f"Not measured: {reason}; whether this adapter helps or harms is not known."
    return ScaleDecision(dict.fromkeys(GROUPS, 1.0), None, text)


@dataclass(frozen=True)
class SearchText:
    """Text both models can read, checked before any work.

    Attributes:
        text: The tokens the scale is searched on.
        vocabulary: Tokens both models share.
    """

    text: TokenizedText
    vocabulary: int


def read_search_text(recipe: Recipe, pair: ModelPair, device: str) -> SearchText:
    """Read the calibration text and make sure that the search will be possible.

    Raises:
        MissingInputError: A text is not there.
        BadDataError: There is too little text.
        IncompatiblePairError: The models have different vocabularies.
        UsageError: A model does not fit in memory.
    """
    import torch

    from moe_svd_distill.calibration.text import (
        load_tokenizer,
        read_documents,
        require_shared_vocabulary,
        split_documents,
        tokenize,
    )

    teacher, student = pair.teacher.checkpoint.folder, pair.student.checkpoint.folder
    comparison = require_shared_vocabulary(teacher, student)
    documents = split_documents(read_documents(recipe.calibration), {"scale search": 1.0}, recipe.seed)["scale search"]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for folder in (teacher, student):
        require_memory(folder, device, dtype)
    text = tokenize(
        documents,
        load_tokenizer(student),
        recipe.scale_search_tokens,
        length=sequence_length(pair),
        vocabulary=comparison.shared,
    )
    return SearchText(text, comparison.shared)


def sequence_length(pair: ModelPair) -> int:
    """The longest sequence both models take, at most 512 tokens."""
    limits = (model.checkpoint.config.get("max_position_embeddings") for model in (pair.teacher, pair.student))
    return min(LONGEST_SEQUENCE, *(int(limit) for limit in limits if limit))


def decide_scale(
    adapter_folder: Path, pair: ModelPair, search_text: SearchText, device: str, report: Callable[[float], None]
) -> ScaleDecision:
    """Measure the adapter at several scales on calibration text and keep what helps.

    Args:
        adapter_folder: The adapter at scale 1.
        pair: Teacher and student.
        search_text: What to measure on.
        device: Where the models run.
        report: Told the fraction done.
    """
    from moe_svd_distill.evaluation.evaluate import teacher_pass
    from moe_svd_distill.evaluation.resident import measure
    from moe_svd_distill.evaluation.scale_search import GLOBAL_SCALES, search_scale

    folder = pair.teacher.checkpoint.folder
    record = teacher_pass(folder, search_text.text, vocabulary=search_text.vocabulary, device=device)
    adapted = AdaptedStudent.load(load_model(pair.student.checkpoint.folder, device), adapter_folder)
    most = len(GLOBAL_SCALES) + 2 + 2 * len(adapted.groups)
    done = 0

    def at(scales: Mapping[str, float]) -> Any:
        nonlocal done
        adapted.set_scale(scales)
        done += 1
        measured = measure(adapted.model, record)
        report(min(1.0, done / most))
        return measured

    found = search_scale(at, adapted.groups)
    details = {
        **{key: value for key, value in found.as_dict().items() if key not in ("scales", "decision")},
        "tokens": search_text.text.tokens,
        "used_documents": sorted(search_text.text.digests),
    }
    return ScaleDecision(dict(found.scales), found.accepted, found.decision, details)
