"""What run.json and evaluation.json hold: typed, in the classes that write it, as far as anything reads it.

The files may be older than this code or damaged (see `files.typed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.evaluation.code.result import CodeBenchmark
from moe_svd_distill.evaluation.result import Benchmarks, Effect, Evaluation
from moe_svd_distill.evaluation.scale_search import ScaleDecision
from moe_svd_distill.files.names import EVALUATION_FILE, RECORD_FILE
from moe_svd_distill.files.typed import at, read_as
from moe_svd_distill.files.writing import write_json
from moe_svd_distill.training.progress import Point
from moe_svd_distill.training.settings import Placement, TrainingSettings
from moe_svd_distill.training.trials import RateTrial
from moe_svd_distill.transfer.facts import TensorFacts, UnitFacts

_FILES = (RECORD_FILE, EVALUATION_FILE)


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Teacher or student: sizes as its configuration has them, 0 for none; its licence as its card has it."""

    source: str
    family: str
    fingerprint: str | None
    bytes: int
    layers: int
    hidden: int
    experts: int
    vocabulary: int
    license: str | None
    notes: tuple[str, ...]


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
class FitRecord:
    """How the calibrated stage went.

    Attributes:
        fitted_on_places: Places of the text that it was fitted on.
        kl_by_pass: KL on other text, before the first pass and after each.
        best_pass: The one that was kept.
        step_size: The head's, as it was at the end.
        last_layers: How many were fitted with the head.
    """

    fitted_on_places: int
    copies_reason: str
    kl_by_pass: tuple[float, ...]
    best_pass: int | None
    ended: str
    halvings: int
    passes_resumed: int
    passes_rejected: tuple[str, ...]
    step_size: float
    last_layers: int
    last_layers_reason: str
    last_layers_step_size: float | None
    last_layers_matrices: int


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """How the refined stage trained; what of it is measured in bytes and seconds is as in `TrainingReport`.

    Attributes:
        best: The place in the curve of what was kept.
        matrices: How many were trained.
        start_pairs: How many of these the start had changed.
    """

    curve: tuple[Point, ...]
    best: int | None
    steps: int
    ended: str
    training_seconds: float = 0.0
    resumed_at_step: int
    bytes_read: int
    seconds_reading: float
    seconds_waiting: float
    peak_anonymous_bytes: int
    peak_device_bytes: int
    saves_rejected: tuple[str, ...]
    settings: TrainingSettings | None
    rate_trials: tuple[RateTrial, ...]
    rate_tried_from_start: bool
    placement: Placement | None
    matrices: int
    head: str
    trained_on_tokens: int = 0
    start_pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What of a text was left out because the adapter was made on it, and what was found when it was read.

    Attributes:
        documents_used: Documents the adapter was made on.
        documents_of_used_groups: Others of the same sources.
        documents_repeated: Others of which most words stand in what the adapter was made on, in blocks of 30 words
            (about 50 tokens) without regard to case, punctuation and white space; None if that is not known, because
            that text is not here.
        groups_apart: Whether documents of the same sources could be left out; if nothing else is left, they stay.
        read: Counts of what was read.
        notes: What people should know of the text.
    """

    documents_used: int
    documents_of_used_groups: int
    documents_repeated: int | None
    groups_apart: bool = True
    read: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def anything(self) -> bool:
        """Whether something was left out."""
        return bool(self.documents_used or self.documents_of_used_groups or self.documents_repeated)


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """What `evaluate` found, as evaluation.json holds it: figures on text, benchmarks, or both.

    Attributes:
        content: All of evaluation.json.
        verdict: Empty where no text was read.
        texts: Files and folders.
    """

    content: Mapping[str, Any] = at("")
    effect: Effect | None
    verdict: str
    texts: tuple[str, ...]
    held_out: LeftOut
    benchmarks: Benchmarks | None
    code_benchmarks: Mapping[str, CodeBenchmark]

    @cached_property
    def on_text(self) -> Evaluation | None:
        """What was measured on text; None where nothing was."""
        return read_as(Evaluation, self.content) if self.content.get("adapted") else None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run, as run.json holds it.

    Attributes:
        content: All of run.json.
        transferred: Whether anything was; None where no calibration text was given, so that nobody knows.
        depth_map: Student layer, and the teacher layers it is set against with their weights.
        base_model: What adapter_config.json names.
        calibration: Of the calibrated stage; of other runs without passes.
        refinement: None without a refined stage.
        evaluation: None before `evaluate`, which keeps it in evaluation.json.
    """

    content: Mapping[str, Any] = at("")
    teacher: ModelRecord
    student: ModelRecord
    base_model: str
    recipe: RecipeRecord
    method: str | None
    depth_map: tuple[Any, ...]
    fates: Mapping[str, int] = at("summary.fates")
    reasons_to_keep: Mapping[str, int] = at("summary.reasons_to_keep")
    projections: Mapping[str, int] = at("summary.projections")
    projection_fallbacks: Mapping[str, str] = at("summary.projection_fallbacks")
    alignments: Mapping[str, int] = at("summary.alignments")
    tensors: tuple[TensorFacts, ...]
    units: tuple[UnitFacts, ...]
    ignored_student_tensors: Mapping[str, str]
    unused_teacher_tensors: Mapping[str, str]
    scale_search: ScaleDecision
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
