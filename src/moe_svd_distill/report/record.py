"""What run.json and evaluation.json hold, as far as anything reads it: typed, and without what is not known here.

The files may be older than this code or damaged: keys that are not known are passed over, and what is missing is None
or empty, in the classes of other rooms too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.algebra.figures import Interval
from moe_svd_distill.evaluation.uncertainty import GapClosed
from moe_svd_distill.files.names import EVALUATION_FILE, RECORD_FILE
from moe_svd_distill.files.writing import write_json
from moe_svd_distill.report.typed import at
from moe_svd_distill.report.typed import read_as as read_as

_FILES = (RECORD_FILE, EVALUATION_FILE)


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Teacher or student: sizes as its configuration has them, 0 or None for none; its licence as its card has it."""

    source: str = ""
    family: str | None
    fingerprint: str | None
    bytes: int | None
    layers: int | None
    hidden: int | None
    experts: int | None
    vocabulary: int | None
    license: str | None


@dataclass(frozen=True, kw_only=True)
class RecipeRecord:
    """What was asked for. Not a `Recipe`, which would refuse values that an earlier version took."""

    depth_map: str | list[float] | None
    interpolation: str = "linear"
    expert_fingerprint: str | None = at("experts.fingerprint")
    expert_clusters: str | int | None = at("experts.clusters")
    expert_assignment: str | None = at("experts.assignment")
    expert_blend: str | None = at("experts.blend")
    start: str = "auto"
    calibration: tuple[Any, ...]
    tokens: int | None
    scale_search_tokens: int | None
    text_field: str | None
    text_group: str | None
    vocabulary: str | None
    seed: int | None
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """What became of one student tensor.

    Attributes:
        layer: None for embeddings and head.
        fate: ``lora`` or ``kept``.
        reason: Why it was kept.
        relative_delta: ‖ΔW‖ / ‖W‖ of the student.
        residual: ‖ΔW − BA‖ / ‖ΔW‖.
        matched_similarity: Of neurons, heads or experts that were matched.
    """

    name: str = "?"
    role: str = "?"
    layer: int | None
    fate: str | None
    reason: str | None
    rank: int | None
    relative_delta: float | None
    residual: float | None
    matched_similarity: float | None


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """One unit of the weights stage: how experts were clustered, and counts by tensor of what could not be used."""

    experts: Mapping[str, Any]
    replaced_by_zero: Mapping[str, int]
    norm_channels_not_folded: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One setting of the scale search: its figures and what fell, in nats per token, with errors over documents."""

    scales: Mapping[str, float]
    kl: float
    cross_entropy: float
    kl_fall: float
    kl_fall_error: float
    cross_entropy_fall: float
    cross_entropy_fall_error: float
    documents: int


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """The scale search.

    Attributes:
        kind: ``kept``, or why nothing was kept; None where nothing was measured.
        used_documents: Digests of the documents the adapter was made on, which an evaluation leaves out.
        used_groups: Their sources.
    """

    decision: str = ""
    kind: str | None
    scales: Mapping[str, float]
    trials: tuple[TrialRecord, ...]
    used_documents: tuple[str, ...]
    used_groups: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A point of the training curve; loss is None at the beginning."""

    step: int | None
    tokens: int | None
    loss: float | None
    kl: float | None


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """How the refined stage trained; `best` is the place in the curve of what was kept."""

    trained_on_tokens: int = 0
    steps: int | None
    training_seconds: float | None
    ended: str = ""
    curve: tuple[CurvePoint, ...]
    best: int | None
    epochs: float | None = at("settings.epochs")
    rate: float | None = at("settings.rate")
    divergence: str | None = at("settings.divergence")
    cross_entropy_share: float | None = at("settings.cross_entropy_share")
    rate_trials: tuple[Any, ...]
    rate_tried_from_start: bool = False
    resident: bool | None = at("placement.resident")
    devices: tuple[str, ...] = at("placement.devices")


@dataclass(frozen=True, kw_only=True)
class FitRecord:
    """How the calibrated stage went: KL on other text before the first pass and after each; which was kept."""

    kl_by_pass: tuple[float, ...]
    best_pass: int | None
    fitted_on_places: int | None
    ended: str = ""


@dataclass(frozen=True, kw_only=True)
class FiguresRecord:
    """The figures of one model: `Figures` as JSON, where what is not finite is None."""

    kl: float | None
    kl_error: float | None
    kl_interval: Interval | None
    cross_entropy: float | None
    cross_entropy_error: float | None
    cross_entropy_interval: Interval | None
    perplexity: float | None
    top1_agreement: float | None
    tokens: int = 0
    documents: int | None


@dataclass(frozen=True, kw_only=True)
class ControlRecord:
    """A control: a random delta, which has a seed, or a temperature, fitted on some of the text."""

    seed: int | None
    temperature: float | None
    fitted_on: str = "?"
    figures: FiguresRecord | None
    gap_closed: GapClosed | None


@dataclass(frozen=True, kw_only=True)
class ScoreRecord:
    """One metric of one task of the lm-evaluation-harness; the error of the change is paired over examples."""

    task: str = "?"
    metric: str = "?"
    filter: str = "none"
    student: float | None
    student_error: float | None
    adapted: float | None
    adapted_error: float | None
    change: float | None
    change_error: float | None


@dataclass(frozen=True, kw_only=True)
class CodeRecord:
    """Programming problems: shares that pass, and how the adapted student's programs failed."""

    name: str = "?"
    source: str = "?"
    problems: int | None
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    student: float | None = at("student.pass_at_1")
    adapted: float | None = at("adapted.pass_at_1")
    teacher: float | None = at("teacher.pass_at_1")
    reasons: Mapping[str, int] = at("adapted.reasons")
    unfinished: int | None = at("adapted.unfinished")
    change: float | None = at("change.change")
    low: float | None = at("change.low")
    high: float | None = at("change.high")
    p_value: float | None = at("change.p_value")
    dtype: str | None = at("settings.dtype")
    token_limit: int | None = at("settings.limit")
    without_network: bool | None = at("guards.network")
    files_guarded: bool | None = at("guards.files")


@dataclass(frozen=True, kw_only=True)
class ContinuationsRecord:
    """How the models went on with passages of the text: who wrote to one text for each; who did not, and why."""

    prompts: tuple[str, ...]
    texts: Mapping[str, tuple[str, ...]]
    skipped: Mapping[str, str]
    new_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """What `evaluate` found: figures, benchmarks, or both."""

    effect: str | None
    verdict: str | None
    student: FiguresRecord | None
    adapted: FiguresRecord | None
    teacher: FiguresRecord | None
    gap_closed: GapClosed | None
    controls: tuple[ControlRecord, ...]
    temperature_control: ControlRecord | None
    sequence_length: int | None
    unit: str = "documents"
    texts: tuple[str, ...]
    documents_used: int | None = at("held_out.documents_used")
    documents_of_used_groups: int | None = at("held_out.documents_of_used_groups")
    documents_repeated: int | None = at("held_out.documents_repeated")
    groups_apart: bool | None = at("held_out.groups_apart")
    other_domain: bool | None = at("domain.different")
    scores: tuple[ScoreRecord, ...] = at("benchmarks.scores")
    score_limit: int | None = at("benchmarks.limit")
    score_dtype: str | None = at("benchmarks.dtype")
    harness: str | None = at("benchmarks.harness")
    code_benchmarks: Mapping[str, CodeRecord]
    continuations: ContinuationsRecord | None
    notes: tuple[str, ...] = at("held_out.notes")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run, as run.json holds it.

    Attributes:
        content: All of run.json.
        transferred: Whether anything was; None where no calibration text was given, so that nobody knows.
        depth_map: Student layer, and the teacher layers it is set against with their weights.
        base_model: What adapter_config.json names.
        calibration: Of the calibrated stage; empty without one.
        refinement: None without a refined stage.
        evaluation: None before `evaluate`, which keeps it in evaluation.json.
    """

    content: Mapping[str, Any] = at("")
    teacher: ModelRecord
    student: ModelRecord
    base_model: str = ""
    recipe: RecipeRecord
    method: str | None
    depth_map: tuple[Any, ...]
    fates: Mapping[str, int] = at("summary.fates")
    reasons_to_keep: Mapping[str, int] = at("summary.reasons_to_keep")
    projections: Mapping[str, int] = at("summary.projections")
    projection_fallbacks: Mapping[str, str] = at("summary.projection_fallbacks")
    alignments: Mapping[str, int] = at("summary.alignments")
    tensors: tuple[TensorRecord, ...]
    units: tuple[UnitRecord, ...]
    ignored_student_tensors: Mapping[str, str]
    unused_teacher_tensors: Mapping[str, str]
    scale_search: SearchRecord
    calibration: FitRecord | None
    refinement: TrainingRecord | None
    evaluation: EvaluationRecord | None
    adapter_sha256: str | None
    transferred: bool | None
    versions: Mapping[str, str]
    finished: str | None

    @classmethod
    def of(cls, content: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> RunRecord:
        """The record of a run, with the content of evaluation.json if there is one."""
        return read_as(cls, {**content, "evaluation": evaluation} if evaluation else content)

    @classmethod
    def in_folder(cls, folder: Path) -> RunRecord:
        """The record in an adapter's folder, with the figures of an evaluation of it; an empty one if there is none.

        Raises:
            BadDataError: run.json or evaluation.json is not a JSON object.
        """
        content, figures = (read_json(file) if (file := folder / name).is_file() else {} for name in _FILES)
        same = figures.get("adapter_sha256") == content.get("adapter_sha256")
        return cls.of(content, figures if content and same else None)

    def write(self, file: Path) -> None:
        write_json(file, self.content)
