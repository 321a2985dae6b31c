"""What run.json and evaluation.json hold, as far as anything reads it: typed, and without what is not known here.

The files may be older than this code or damaged: keys that are not known are passed over, and what is missing is None
or empty, in the classes of other rooms too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.algebra.figures import Interval
from moe_svd_distill.evaluation.uncertainty import GapClosed
from moe_svd_distill.files.names import RECORD_FILE
from moe_svd_distill.files.writing import write_json

T = TypeVar("T")


def _at(path: str) -> Any:
    """A field that lies elsewhere in the JSON than under its name; keys are joined by dots."""
    return field(metadata={"path": path})


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Teacher or student; sizes as the configuration has them, 0 or None where it has none."""

    source: str = ""
    family: str | None
    fingerprint: str | None
    bytes: int | None
    layers: int | None
    hidden: int | None
    experts: int | None
    vocabulary: int | None


@dataclass(frozen=True, kw_only=True)
class RecipeRecord:
    """What was asked for. Not a `Recipe`, which would refuse values that an earlier version took."""

    depth_map: str | list[float] | None
    interpolation: str = "linear"
    expert_fingerprint: str | None = _at("experts.fingerprint")
    expert_clusters: str | int | None = _at("experts.clusters")
    expert_assignment: str | None = _at("experts.assignment")
    expert_blend: str | None = _at("experts.blend")
    start: str = "auto"
    calibration: tuple[Any, ...]
    tokens: int | None
    scale_search_tokens: int | None
    text_field: str | None
    text_group: str | None
    vocabulary: str | None
    seed: int | None


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
    epochs: float | None = _at("settings.epochs")
    rate: float | None = _at("settings.rate")
    divergence: str | None = _at("settings.divergence")
    cross_entropy_share: float | None = _at("settings.cross_entropy_share")
    rate_trials: tuple[Any, ...]
    rate_tried_from_start: bool = False
    resident: bool | None = _at("placement.resident")
    devices: tuple[str, ...] = _at("placement.devices")


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
    student: float | None = _at("student.pass_at_1")
    adapted: float | None = _at("adapted.pass_at_1")
    teacher: float | None = _at("teacher.pass_at_1")
    reasons: Mapping[str, int] = _at("adapted.reasons")
    unfinished: int | None = _at("adapted.unfinished")
    change: float | None = _at("change.change")
    low: float | None = _at("change.low")
    high: float | None = _at("change.high")
    p_value: float | None = _at("change.p_value")
    dtype: str | None = _at("settings.dtype")
    token_limit: int | None = _at("settings.limit")
    without_network: bool | None = _at("guards.network")
    files_guarded: bool | None = _at("guards.files")


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
    documents_used: int | None = _at("held_out.documents_used")
    documents_of_used_groups: int | None = _at("held_out.documents_of_used_groups")
    documents_repeated: int | None = _at("held_out.documents_repeated")
    groups_apart: bool | None = _at("held_out.groups_apart")
    other_domain: bool | None = _at("domain.different")
    scores: tuple[ScoreRecord, ...] = _at("benchmarks.scores")
    score_limit: int | None = _at("benchmarks.limit")
    score_dtype: str | None = _at("benchmarks.dtype")
    harness: str | None = _at("benchmarks.harness")
    code_benchmarks: Mapping[str, CodeRecord]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run, as run.json holds it.

    Attributes:
        content: All of run.json.
        transferred: Whether anything was; None where no calibration text was given, so that nobody knows.
        depth_map: Student layer, and the teacher layers it is set against with their weights.
        base_model: What adapter_config.json names.
        refinement: None without a refined stage.
        evaluation: None before `evaluate`, which keeps it in evaluation.json.
    """

    content: Mapping[str, Any] = _at("")
    teacher: ModelRecord
    student: ModelRecord
    base_model: str = ""
    recipe: RecipeRecord
    method: str | None
    depth_map: tuple[Any, ...]
    fates: Mapping[str, int] = _at("summary.fates")
    reasons_to_keep: Mapping[str, int] = _at("summary.reasons_to_keep")
    projections: Mapping[str, int] = _at("summary.projections")
    projection_fallbacks: Mapping[str, str] = _at("summary.projection_fallbacks")
    alignments: Mapping[str, int] = _at("summary.alignments")
    tensors: tuple[TensorRecord, ...]
    units: tuple[UnitRecord, ...]
    ignored_student_tensors: Mapping[str, str]
    unused_teacher_tensors: Mapping[str, str]
    scale_search: SearchRecord
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
        """The record in an adapter's folder; an empty one if there is none.

        Raises:
            BadDataError: run.json is not a JSON object.
        """
        file = folder / RECORD_FILE
        return cls.of(read_json(file) if file.is_file() else {})

    def write(self, file: Path) -> None:
        write_json(file, self.content)


def read_as(kind: Callable[..., T], content: Any) -> T:
    """A dataclass from JSON: what is missing, null or of another type has the field's default, or is None or empty."""
    found = {}
    for name, path, convert in _readers(kind):
        value = content
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        found[name] = convert(value)
    return kind(**found)


@cache
def _readers(kind: Any) -> tuple[tuple[str, tuple[str, ...], Callable[[Any], Any]], ...]:
    """Name, place in the JSON and conversion of every field."""
    hints = get_type_hints(kind)
    readers = []
    for each in fields(kind):
        path = str(each.metadata.get("path", each.name))
        default = None if each.default is MISSING else each.default
        readers.append((each.name, tuple(path.split(".")) if path else (), _conversion(hints[each.name], default)))
    return tuple(readers)


def _conversion(hint: Any, default: Any = None) -> Callable[[Any], Any]:
    kind, inside = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return lambda value: read_as(hint, value)  # type: ignore[arg-type]
    if kind is tuple:
        each = _conversion(inside[0])
        return lambda value: tuple(map(each, value)) if isinstance(value, list | tuple) else ()
    if kind is Mapping:
        of_key = _conversion(inside[1])
        return lambda value: {k: of_key(v) for k, v in value.items()} if isinstance(value, Mapping) else {}
    known = [each for each in inside if each is not NoneType] if kind in (Union, UnionType) else [hint]
    if is_dataclass(known[0]):
        return lambda value: read_as(known[0], value) if isinstance(value, Mapping) and value else None
    if hint is Any:
        return lambda value: value
    kinds = tuple(get_origin(each) or each for each in known)
    return lambda value: value if isinstance(value, (*kinds, int) if float in kinds else kinds) else default
