"""How related two models are, and which stages a run has: what was asked for, or what that recommends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import DistillError, MissingInputError, NothingToTransferError, UsageError
from moe_svd_distill.files.names import ADAPTER_FILE
from moe_svd_distill.pairing.lineage import (
    Lineage,
    MethodChoice,
    Relatedness,
    SizeDifference,
    Vocabularies,
    VocabularyRelation,
    choose_method,
    judge,
    shapes_agree,
)
from moe_svd_distill.pipeline.extra_text import MUCH_TEXT
from moe_svd_distill.pipeline.pair import Model, ModelPair, open_pair
from moe_svd_distill.pipeline.schedule import trains_head
from moe_svd_distill.recipe import Recipe

_OF_THE_FIT = ("fit_passes", "last_layers", "head_rank", "head_format")
_STARTS = ("weights", "calibrated", "weights+calibrated")


@dataclass(frozen=True)
class Stages:
    """The stages of a run.

    Attributes:
        names: ``weights``, ``calibrated``, ``refined``, in order.
        reason: Why, in a sentence.
        relatedness: What was measured.
        start: Folder of the adapter that training begins with, where it is none of the stages.
    """

    names: tuple[str, ...]
    reason: str
    relatedness: Relatedness
    start: Path | None = None

    @property
    def weights(self) -> bool:
        """Whether the weight difference is projected."""
        return "weights" in self.names

    @property
    def calibrated(self) -> bool:
        """Whether the head is fitted on text."""
        return "calibrated" in self.names

    @property
    def refined(self) -> bool:
        """Whether the pairs are trained on text."""
        return "refined" in self.names

    def as_dict(self) -> dict[str, object]:
        """For run.json."""
        return {"stages": list(self.names), "reason": self.reason, "relatedness": self.relatedness.as_dict()}


def measure_relatedness(pair: ModelPair, *, sample_weights: bool = True) -> Relatedness:
    """Compare two models within seconds, whatever their size; at most 64 MiB of weights are read of each.

    Args:
        pair: Teacher and student.
        sample_weights: Whether weights may be read; without, the lineage stays unknown.
    """
    from moe_svd_distill.pipeline.probing import probe_pair

    families = (pair.teacher.layout.model_type, pair.student.layout.model_type)
    differences = _size_differences(pair)
    vocabulary = _relate_vocabularies(pair)
    same_shape = shapes_agree(families, differences)
    if not sample_weights:
        lineage, reason = judge((), same_shape=same_shape, all_alike=False)
        why = "lineage: only the headers were read, because the weights are not on this machine"
        return Relatedness(families, differences, vocabulary, (), (why,), lineage, reason, (0, 0))
    probes, skipped, all_alike, bytes_read = probe_pair(pair, vocabulary, same_shape=same_shape)
    lineage, reason = judge(probes, same_shape=same_shape, all_alike=all_alike)
    return Relatedness(families, differences, vocabulary, probes, skipped, lineage, reason, bytes_read)


def choose_stages(recipe: Recipe, pair: ModelPair) -> Stages:
    """Measure the pair and decide.

    Raises:
        UsageError: A pair is asked for a head that is tied to the embeddings.
        NothingToTransferError: ``auto`` finds nothing worth running.
        MissingInputError: As ``stages_for``.
    """
    if "calibrated" in recipe.method or recipe.method == "refined":
        _refuse_pair_of_tied_head(recipe, pair)
    pair.student.architecture  # noqa: B018  refuses what no stage can make an adapter for, before anything is measured
    stages = stages_for(recipe, measure_relatedness(pair))
    refuse_nothing(recipe, stages)
    if stages.calibrated:
        _refuse_pair_of_tied_head(recipe, pair)
    return stages


def refuse_nothing(recipe: Recipe, stages: Stages) -> None:
    """Refuse a run without stages, and say what would give it one.

    Raises:
        NothingToTransferError: There are none.
    """
    if not stages.names:
        if stages.relatedness.lineage is Lineage.SAME:
            action = "Choose a teacher that differs from the student"
        elif recipe.calibration and recipe.head == "keep":
            action = "Leave head at delta, or ask for the weights alone: --method weights"
        elif recipe.calibration and stages.relatedness.vocabulary.kind is Vocabularies.UNKNOWN:
            action = (
                "Put the tokenizer's files into the models' folders, or ask for the weights alone: --method weights"
            )
        elif recipe.calibration:
            action = "Give vocabulary: shared, choose a pair with one tokenizer, or ask for --method weights"
        else:
            action = "Give text with --calibration, or ask for the weights alone: --method weights"
        raise NothingToTransferError(stages.reason, action)


def stages_for(recipe: Recipe, relatedness: Relatedness) -> Stages:
    """The stages for a pair so related; none where ``auto`` finds nothing worth running.

    Raises:
        MissingInputError: The start is neither a stage nor the folder of an adapter.
    """
    found = _asked_or_automatic(recipe, relatedness)
    rows = relatedness.vocabulary.shared
    if "calibrated" not in found.names or trains_head(recipe, rows):
        return found
    names = tuple(dict.fromkeys("refined" if stage == "calibrated" else stage for stage in found.names))
    reason = (
        f"{found.reason}; the vocabulary of {rows:,} tokens is large for so little text, so the head stands still and "
        "all layers are trained for few steps (refined) where the calibrated stage would fit the head"
    )
    unused = [key for key in _OF_THE_FIT if key in recipe.model_fields_set]
    if unused:
        reason += f"; {', '.join(unused)} {'is' if len(unused) == 1 else 'are'} of the fit alone and not used"
    return replace(found, names=names, reason=reason)


def _asked_or_automatic(recipe: Recipe, relatedness: Relatedness) -> Stages:
    if recipe.method == "refined" and recipe.start != "auto":
        return _from_start(recipe.start, relatedness)
    if recipe.method not in ("auto", "refined"):
        return Stages(tuple(recipe.method.split("+")), f"asked for: method {recipe.method}", relatedness)
    choice = automatic_choice(recipe, relatedness)
    if recipe.method == "refined" and choice.stages:
        reason = f"asked for: method refined; it starts so: {choice.reason}"
        before = choice.stages
        if recipe.tokens > MUCH_TEXT and "calibrated" in before:
            before = tuple(stage for stage in before if stage != "calibrated")
            reason += f"; above {MUCH_TEXT:,} tokens auto leaves the calibrated stage out"
        return Stages((*before, "refined"), reason, relatedness)
    return Stages(choice.stages, choice.reason, relatedness)


def automatic_choice(recipe: Recipe, relatedness: Relatedness) -> MethodChoice:
    """What ``method: auto`` makes of a pair so related."""
    trains = bool(recipe.calibration) and recipe.head == "delta"
    without = "head: keep leaves nothing to fit on the text" if recipe.calibration else "no text was given"
    return choose_method(relatedness, trains, shared=recipe.vocabulary == "shared", without=without)


def compare_models(teacher: str, student: str) -> Mapping[str, Any]:
    """Sizes, relatedness and the automatic choice with text and without. Of a hub model nothing large is fetched.

    Raises:
        DistillError: A model cannot be opened.
    """
    with open_pair(teacher, student, headers_only=True) as pair:
        relatedness = measure_relatedness(pair, sample_weights=pair.at_hand)
        return {
            "teacher": _sizes(pair.teacher),
            "student": _sizes(pair.student),
            "relatedness": relatedness.as_dict(),
            "method": {
                "with_text": choose_method(relatedness, has_text=True).as_dict(),
                "without_text": choose_method(relatedness, has_text=False).as_dict(),
            },
        }


def notes_on_sizes(pair: ModelPair) -> list[str]:
    """What is odd about the sizes of a pair."""
    teacher, student = (model.layout.parameters(model.shapes)[0] for model in (pair.teacher, pair.student))
    if student <= teacher:
        return []
    return [f"the student is larger than its teacher ({student:,} against {teacher:,} parameters): are they swapped?"]


def _from_start(start: str, relatedness: Relatedness) -> Stages:
    """Training from what the recipe names.

    Raises:
        MissingInputError: It is neither a stage nor the folder of an adapter.
    """
    reason = f"asked for: method refined from {start}"
    if start == "zero":
        return Stages(("refined",), reason, relatedness)
    if start in _STARTS:
        return Stages((*start.split("+"), "refined"), reason, relatedness)
    folder = Path(start).expanduser()
    if not (folder / ADAPTER_FILE).is_file():
        raise MissingInputError(
            f"start {start} holds no adapter (no {ADAPTER_FILE})",
            f"Give an adapter's folder, or one of auto, zero, {', '.join(_STARTS)}",
        )
    return Stages(("refined",), reason, relatedness, folder)


def _refuse_pair_of_tied_head(recipe: Recipe, pair: ModelPair) -> None:
    if recipe.head_format == "whole" and getattr(pair.student.architecture.skeleton.head, "bias", None) is not None:
        raise UsageError(
            "head_format: whole, but the student's head has a bias, which PEFT would want saved with it",
            "Leave head_format at auto, which then gives the head a LoRA pair",
        )
    if recipe.head_format == "pair" and pair.student.architecture.tied:
        raise UsageError(
            "head_format: pair, but the student ties its head to its embeddings: merged, a pair would change both",
            "Leave head_format at auto, which then saves the head whole",
        )


def _sizes(model: Model) -> dict[str, object]:
    """Family, sizes and bytes of one model."""
    layout, checkpoint = model.layout, model.checkpoint
    return {
        "model": checkpoint.source,
        "family": layout.model_type,
        **asdict(layout.geometry),
        "tensors": len(checkpoint),
        "bytes": checkpoint.total_bytes,
    }


def _size_differences(pair: ModelPair) -> tuple[SizeDifference, ...]:
    """Every size that differs."""
    teacher, student = asdict(pair.teacher.layout.geometry), asdict(pair.student.layout.geometry)
    return tuple(
        SizeDifference(name, int(size), int(student[name])) for name, size in teacher.items() if size != student[name]
    )


def _relate_vocabularies(pair: ModelPair) -> VocabularyRelation:
    """Whether both number their tokens alike; unknown where a tokenizer is missing or unreadable."""
    from moe_svd_distill.calibration.vocabulary import compare_vocabularies

    sizes = (pair.teacher.layout.geometry.vocabulary, pair.student.layout.geometry.vocabulary)
    try:
        found = compare_vocabularies(pair.teacher.checkpoint.folder, pair.student.checkpoint.folder)
    except DistillError as error:
        return VocabularyRelation(Vocabularies.UNKNOWN, min(sizes), reasons=(error.what,))
    reasons = tuple(found.reasons)
    if sizes[0] != sizes[1]:
        reasons += (f"the teacher's embeddings have {sizes[0]} rows and the student's {sizes[1]}",)
    if not found.equal:
        kind, reasons = Vocabularies.DIFFERENT, (*reasons, found.overlap)
    else:
        kind = Vocabularies.PADDED if reasons else Vocabularies.EQUAL
    return VocabularyRelation(kind, min(found.shared, *sizes), found.common, reasons)
