"""How a student is related to its teacher, as data; what follows from the figures; and which stages fit.

Thresholds come from pairs of trained models whose history is known, and from crops with noise: models with initial
weights of their own stay within 0.11 of chance though they were trained on the same text, relatives were 0.75 to 0.98
above it. The correlation of the cosine-similarity matrices of vocabulary rows is *not*
used: unrelated models of one text reached 0.93 in their heads, a cropped student 0.97.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

RELATED = 0.25  # cosine above chance
DEVIATIONS = 2.0  # and standard deviations of a pair that does not correspond above chance
# What may differ while every tensor keeps its shape, or only gains rows for tokens.
SHAPELESS = frozenset({"vocabulary", "experts_per_token", "tied_embeddings"})
ENDS = frozenset({"embedding", "head"})


class Lineage(StrEnum):
    """What the weights say about the history of the pair."""

    SAME = "same weights"
    ONE = "one lineage"
    CROPPED = "possibly cropped lineage"
    INDEPENDENT = "independent"
    UNKNOWN = "unknown"


class Vocabularies(StrEnum):
    """Whether a token number means the same in both models."""

    EQUAL = "equal"
    PADDED = "padded"
    DIFFERENT = "different"
    UNKNOWN = "unknown"


class Comparison(StrEnum):
    """How the rows of two tensors were brought together."""

    IN_PLACE = "in place"
    ROWS = "rows permuted"
    CHANNELS = "hidden dimensions permuted"


@dataclass(frozen=True)
class SizeDifference:
    """A size of config.json that differs."""

    name: str
    teacher: int
    student: int


@dataclass(frozen=True)
class VocabularyRelation:
    """The two vocabularies.

    Attributes:
        kind: Padded: equal numbering, but other embedding sizes or additional special tokens.
        shared: Numbers 0 … shared-1 mean the same token in both.
        overlap: Ordinary tokens that both have, under whatever number; None where that is not known.
        reasons: What differs, or why it is not known.
    """

    kind: Vocabularies
    shared: int
    overlap: int | None = None
    reasons: tuple[str, ...] = ()

    @property
    def comparable(self) -> bool:
        """Whether the two distributions over the next token can be compared number by number."""
        return self.kind in (Vocabularies.EQUAL, Vocabularies.PADDED)


@dataclass(frozen=True)
class Probe:
    """One measurement on sampled rows of one tensor of each model.

    Attributes:
        role: Of the tensors.
        teacher: Name of the teacher's tensor.
        student: Name of the student's.
        comparison: How rows were brought together.
        rows: Student rows read.
        cosine: Mean cosine similarity.
        chance: The same where nothing corresponds (the control).
        spread: Standard deviation of the cosine of a pair that does not correspond.
        identical: Every sampled number is equal.
    """

    role: str
    teacher: str
    student: str
    comparison: Comparison
    rows: int
    cosine: float
    chance: float
    spread: float
    identical: bool = False

    @property
    def above_chance(self) -> float:
        """Cosine minus the control's."""
        return self.cosine - self.chance

    @property
    def deviations(self) -> float:
        """How many standard deviations of an unrelated pair that is."""
        return self.above_chance / max(self.spread, 1e-6)

    @property
    def related(self) -> bool:
        """Neither small nor explained by chance."""
        return self.identical or (self.above_chance >= RELATED and self.deviations >= DEVIATIONS)


@dataclass(frozen=True)
class Relatedness:
    """What is known about a pair before any work.

    Attributes:
        families: ``model_type`` of teacher and student.
        differences: Every size that differs.
        vocabulary: The two vocabularies.
        probes: What was measured on the weights; empty if nothing could be.
        skipped: What was not measured, and why.
        lineage: The verdict.
        reason: The verdict's grounds in one sentence.
        bytes_read: Bytes of weights asked for, of teacher and student.
    """

    families: tuple[str, str]
    differences: tuple[SizeDifference, ...]
    vocabulary: VocabularyRelation
    probes: tuple[Probe, ...]
    skipped: tuple[str, ...]
    lineage: Lineage
    reason: str
    bytes_read: tuple[int, int]

    @property
    def same_family(self) -> bool:
        """Whether both are of one architecture."""
        return self.families[0] == self.families[1]

    @property
    def same_shape(self) -> bool:
        """One architecture, and every tensor of one shape (vocabulary apart)."""
        return shapes_agree(self.families, self.differences)

    def as_dict(self) -> dict[str, object]:
        """Plain JSON types, with what is derived."""
        probes = [
            asdict(probe) | {"deviations": round(probe.deviations, 2), "related": probe.related}
            for probe in self.probes
        ]
        derived = {"same_family": self.same_family, "same_shape": self.same_shape, "probes": probes}
        return asdict(self) | derived


@dataclass(frozen=True)
class MethodChoice:
    """What ``method: auto`` runs, in order; no stage at all where nothing is worth running."""

    stages: tuple[str, ...]
    reason: str

    def as_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {"stages": list(self.stages), "reason": self.reason}


def shapes_agree(families: tuple[str, str], differences: tuple[SizeDifference, ...]) -> bool:
    """Whether two models of these sizes hold tensors of the same shapes, the vocabulary apart."""
    return families[0] == families[1] and all(difference.name in SHAPELESS for difference in differences)


def judge(probes: tuple[Probe, ...], *, same_shape: bool, all_alike: bool) -> tuple[Lineage, str]:
    """The verdict and its grounds.

    Args:
        probes: What was measured.
        same_shape: As ``Relatedness.same_shape``.
        all_alike: Besides the probes, a row of every other tensor was compared and is identical.
    """
    if not probes:
        return Lineage.UNKNOWN, "no tensors of the two could be compared"
    if same_shape and all_alike and all(probe.identical for probe in probes):
        return Lineage.SAME, "every sampled row of every tensor is identical"
    related = [probe for probe in probes if probe.related]
    if not related:
        nearest = max(probes, key=lambda probe: probe.above_chance)
        return Lineage.INDEPENDENT, f"no sampled tensor is alike; the nearest is {_figures(nearest)}"
    roles, tried = {probe.role for probe in related}, {probe.role for probe in probes}
    body, body_tried = roles - ENDS, tried - ENDS
    grounds = f"{len(roles)} of {len(tried)} kinds of tensors are alike, {_figures(_strongest(related))}"
    if body_tried and not body:
        return Lineage.CROPPED, f"only the {' and the '.join(sorted(roles))} are alike: {_figures(_strongest(related))}"
    if same_shape and any(probe.comparison is Comparison.IN_PLACE for probe in related):
        return Lineage.ONE, grounds
    where = "the shapes differ" if not same_shape else "the hidden dimensions stand in another order"
    return Lineage.CROPPED, f"{where}, but {grounds}"


def choose_method(
    relatedness: Relatedness, has_text: bool, *, shared: bool = False, without: str = "no text was given"
) -> MethodChoice:
    """The stages that measurements recommend for such a pair (docs/decisions has the figures).

    Args:
        relatedness: What is known of the pair.
        has_text: Whether calibration text was given.
        shared: Whether different vocabularies are to be compared on what they have in common.
        without: Why there is no text.
    """
    lineage, vocabulary = relatedness.lineage, relatedness.vocabulary
    usable = has_text and (vocabulary.comparable or shared)
    if has_text and not usable:
        why = "the vocabularies differ" if vocabulary.kind is Vocabularies.DIFFERENT else "the vocabularies are unknown"
        without = f"{why}, so the text cannot be used"
    if lineage is Lineage.SAME:
        return MethodChoice((), "teacher and student hold the same weights: there is nothing to transfer")
    if lineage is Lineage.ONE:
        if usable:
            reason = "one lineage and one shape: the weight difference transfers, and the text refines and guards it"
            return MethodChoice(("weights", "calibrated"), reason)
        return MethodChoice(("weights",), f"one lineage and one shape: the weight difference transfers; {without}")
    kind = {
        Lineage.CROPPED: "the student's weights are rearranged or cropped from the teacher's",
        Lineage.INDEPENDENT: "the weights are independent of each other",
        Lineage.UNKNOWN: "the lineage is not known",
    }[lineage]
    if usable:
        reason = f"{kind}: projected weights give nothing for such pairs, a fit on the text does"
        if lineage is Lineage.UNKNOWN:
            reason = f"{kind}, and a fit on the text does not depend on it"
        return MethodChoice(("calibrated",), reason)
    return MethodChoice((), f"{without}; {kind}, and projected weights measured nothing or harm for such pairs")


def _strongest(probes: list[Probe]) -> Probe:
    return max(probes, key=lambda probe: probe.deviations)


def _figures(probe: Probe) -> str:
    return (
        f"{probe.role} with cosine {probe.cosine:.2f}, {probe.comparison} "
        f"(chance {probe.chance:.2f}, {probe.deviations:+.1f} standard deviations)"
    )
