"""What an evaluation finds, as data, in one word and in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from moe_svd_distill.algebra.figures import Figures, Interval, Measurement
from moe_svd_distill.calibration.domain import DomainDistance
from moe_svd_distill.evaluation.continuations import Continuations
from moe_svd_distill.evaluation.loading import Residency
from moe_svd_distill.evaluation.uncertainty import GapClosed, cross_entropy_change, kl_change, mean_gap
from moe_svd_distill.files.typed import as_json

Effect: TypeAlias = Literal["helps", "recalibrates", "mixed", "harms", "none", "unproven"]

ERRORS = 3.0
BAND = 0.02  # of KL: an interval within this is no effect, one beyond it says that the text is too little


@dataclass(frozen=True)
class Control:
    """The student with a random delta of the adapter's norms in its place."""

    seed: int
    figures: Figures
    gap_closed: GapClosed


@dataclass(frozen=True)
class TemperatureControl:
    """The untouched student with its logits divided by one temperature, which was fitted on other text.

    Attributes:
        temperature: T of the lowest KL on the text it was fitted on.
        fitted_on: `calibration text`, or `half of the text`: then the rest is about the other half.
        at_edge: Whether T stands at the end of the range that was searched.
        student: The untouched student on the documents measured here.
        figures: The student at temperature T on them.
        gap_closed: What the temperature closes there.
        adapter_gap_closed: What the adapter closes on the same documents.
        adapter_ahead: By how much KL is lower with the adapter than with the temperature, in nats per token; 95 %.
    """

    temperature: float
    fitted_on: str
    at_edge: bool
    student: Figures
    figures: Figures
    gap_closed: GapClosed
    adapter_gap_closed: GapClosed
    adapter_ahead: Interval | None


@dataclass(frozen=True)
class Aligned:
    """What the figures of a pair with different tokenizers are over.

    Both models' distributions are taken over the tokens that read the same bytes in both, each made to sum to 1 there,
    at the places where both have read the same characters and such a token follows.

    Attributes:
        common_tokens: Tokens that both models have.
        places: Places that are compared.
        places_share: Of the tokens the student predicts in the same text.
        teacher_mass: Mean probability that the teacher's whole distribution has on the common tokens at these places.
    """

    common_tokens: int
    places: int
    places_share: float
    teacher_mass: float

    @property
    def note(self) -> str:
        """In one sentence."""
        return (
            f"The tokenizers differ: measured over the {self.common_tokens:,} tokens both have, at the "
            f"{100 * self.places_share:.1f} % of the student's tokens where the two align; "
            f"{100 * self.teacher_mass:.1f} % of the teacher's probability is on tokens that both have."
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything measured on one held-out text.

    Attributes:
        effect: In one word, from figures beyond noise.
        teacher: The teacher itself.
        student: The untouched student.
        adapted: The student with the adapter as PEFT loads it.
        gap_closed: What the adapter closes.
        controls: Random deltas of equal norm, one for each seed.
        temperature_control: One temperature on the untouched student; None with a single document.
        vocabulary: Tokens the distributions are taken over.
        sequence_length: Tokens of a sequence.
        unit: What the standard errors treat as independent: documents or sequences.
        seconds: Wall time.
        places: Where the states of each model came from.
        dtypes: What each computed in; heads and figures are float32.
        kept_states: Files of streamed states that stay for the next evaluation on the same text.
        domain: How far the text is from the calibration text; None where that is not known.
        continuations: How the models go on with a little of the text.
        aligned: What is compared of a pair with different tokenizers; None where they number their tokens alike.
    """

    effect: Effect
    teacher: Figures
    student: Figures
    adapted: Figures
    gap_closed: GapClosed
    controls: tuple[Control, ...]
    temperature_control: TemperatureControl | None
    vocabulary: int
    sequence_length: int
    unit: str = "documents"
    seconds: float
    places: Mapping[str, Residency]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    domain: DomainDistance | None = None
    kept_states: tuple[str, ...] = ()
    continuations: Continuations = field(default_factory=Continuations)
    aligned: Aligned | None = None

    derived: ClassVar[tuple[str, ...]] = ("control_gap_closed",)

    @property
    def control_gap_closed(self) -> GapClosed | None:
        """The controls' mean; None without controls."""
        return mean_gap([control.gap_closed for control in self.controls]) if self.controls else None

    @property
    def verdict(self) -> str:
        """What is found in one or two sentences for the user, with the figures it rests on."""
        note = " Calibrated on text of another domain." if self.domain is not None and self.domain.different else ""
        note += "" if self.aligned is None else f" {self.aligned.note}"
        return _sentence(self) + note

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {"effect": self.effect, "verdict": self.verdict, **as_json(self)}


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        filter: What the harness did to the answers before scoring them; `none` where nothing.
        higher_is_better: Which way is up; None where the task does not say.
        examples: Examples that were scored; None for a group of tasks.
        student: The untouched student's.
        student_error: Its standard error as the harness gives it; None where it gives none.
        adapted: With the adapter.
        adapted_error: The same.
        change: adapted − student.
        change_error: Standard error of the change, paired over examples; None where the metric is no mean of examples.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    examples: int | None
    student: float
    student_error: float | None
    adapted: float
    adapted_error: float | None
    change: float
    change_error: float | None


@dataclass(frozen=True)
class Benchmarks:
    """What the harness found.

    Attributes:
        scores: Every metric of every task that was asked for.
        tasks: Task to its version and number of examples in the prompt.
        limit: Examples of each task at most; None for all. Scores under a limit are not comparable with published ones.
        dtype: Type the models were loaded in.
        harness: Version of lm-eval.
    """

    scores: tuple[Score, ...]
    tasks: Mapping[str, Mapping[str, object]]
    limit: int | None
    dtype: str
    harness: str


def effect_of(
    before: Measurement,
    after: Measurement,
    *,
    kl_interval: Interval | None = None,
    ahead_of_temperature: Interval | None = None,
) -> Effect:
    """Judge by paired changes over documents, beyond 3 standard errors.

    `mixed` is KL that falls while cross-entropy rises, which is no transfer; `recalibrates` is a fall that is not
    beyond that of one temperature on the student's logits. `none` is a fall whose interval lies within 2 % of KL around
    0; a wider one that holds 0 is `unproven`.

    Args:
        before: The untouched student.
        after: The student with the adapter.
        kl_interval: 95 % of the KL gap closed; what holds 0 does not help.
        ahead_of_temperature: 95 % of how much lower KL is with the adapter than with the temperature; None where no
            temperature was measured.
    """
    kl, risen = kl_change(before, after), cross_entropy_change(after, before)
    if kl_change(after, before).falls(ERRORS):
        return "harms"
    if not kl.falls(ERRORS) or (kl_interval is not None and kl_interval.low <= 0):
        if risen.falls(ERRORS):
            return "harms"
        return "none" if abs(kl.fall) + kl.margin(ERRORS) <= BAND * kl.before else "unproven"
    if risen.falls(1.0):
        return "mixed"
    if ahead_of_temperature is not None and ahead_of_temperature.low <= 0:
        return "recalibrates"
    return "helps"


def _sentence(found: Evaluation) -> str:
    before, after, gap = found.student, found.adapted, found.gap_closed
    ways = f"KL {before.kl:.4f} → {after.kl:.4f}, cross-entropy {before.cross_entropy:.4f} → {after.cross_entropy:.4f}"
    temperature = None if found.temperature_control is None else found.temperature_control.gap_closed
    match found.effect:
        case "helps" if gap.cross_entropy is None:
            return (
                f"Closes {_percent(gap)} of the KL gap to the teacher; the student's cross-entropy was not certainly "
                "worse than the teacher's."
            )
        case "helps":
            return (
                f"Closes {_percent(gap)} of the KL gap and {gap.cross_entropy:.1f} % of the cross-entropy gap to the "
                "teacher."
            )
        case "recalibrates":
            return (
                f"No more than recalibration: closes {_percent(gap)} of the KL gap, one temperature on the untouched "
                f"student's logits {_percent(temperature)}."
            )
        case "mixed":
            return f"No transfer: KL falls but cross-entropy rises ({ways})."
        case "harms":
            return f"Harms the student: {ways}."
        case "none" if before == after:
            return f"The adapter changes nothing: nothing was transferred ({ways})."
        case "none":
            return f"No effect: {ways}."
        case "unproven":
            return f"Not proven on so little text: {ways}. Give more held-out text, or more of it (--tokens)."


def _percent(gap: GapClosed | None) -> str:
    """Of the KL gap."""
    return "an unknown share" if gap is None or gap.kl is None else f"{gap.kl:.1f} %"
