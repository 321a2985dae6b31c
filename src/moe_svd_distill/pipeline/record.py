"""What a run leaves: its record, run.json (what was asked, what became of every tensor, with which versions), and the
adapter beside it."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.errors import MissingInputError, UsageError
from moe_svd_distill.execution.parts import read_record
from moe_svd_distill.execution.supervisor import ExecutionSummary
from moe_svd_distill.files.names import CONFIGURATION_FILE, RECORD_FILE
from moe_svd_distill.pairing.plan import Plan
from moe_svd_distill.pipeline.pair import Model, ModelPair
from moe_svd_distill.pipeline.placement import execution_settings
from moe_svd_distill.pipeline.units import NUMERIC_LIBRARIES, PROJECT
from moe_svd_distill.recipe import Recipe
from moe_svd_distill.report.record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from moe_svd_distill.pipeline.method import Stages
    from moe_svd_distill.pipeline.stage import StageResult

SCHEMA = 1
NOT_TRAINED = "the refined stage trains the matrices of the layers and the head alone"
HEAD_STANDS_STILL = (
    "the head stands still: fewer than four tokens of text for each of its rows, or training.head: fixed"
)
NOT_PAIRED = "the weights stage does not know what it means"
NOT_FITTED = "the calibrated stage changes the head and the last layers alone"


@dataclass(frozen=True, repr=False)
class Adapter:
    """A published adapter.

    Attributes:
        folder: Where it lies.
        record: The run it comes from.
    """

    folder: Path
    record: RunRecord

    def __repr__(self) -> str:
        kept = {True: "transferred", False: "nothing transferred", None: "not measured"}[self.transferred]
        return f"Adapter({str(self.folder)!r}, method={self.record.method!r}, {kept})"

    @property
    def sha256(self) -> str:
        """Digest of adapter_model.safetensors."""
        assert self.record.adapter_sha256 is not None
        return self.record.adapter_sha256

    @property
    def transferred(self) -> bool | None:
        """Whether anything was transferred: None where no calibration text was given, so nobody knows."""
        return self.record.transferred


def load_adapter(folder: Path | str) -> Adapter:
    """A published adapter.

    Raises:
        MissingInputError: The folder holds none.
        BadDataError: run.json is not a JSON object.
    """
    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file():
        raise MissingInputError(
            f"{folder} holds no finished adapter (no {RECORD_FILE})", "Run moe-svd-distill distill with this --output"
        )
    return Adapter(folder, RunRecord.in_folder(folder))


def base_model(folder: Path | str, given: str | None = None) -> str:
    """The student that was given, or else the one that the adapter in a folder names.

    Raises:
        MissingInputError: The folder holds no adapter.
        UsageError: There is neither.
    """
    configuration = Path(folder) / CONFIGURATION_FILE
    if not configuration.is_file():
        raise MissingInputError(f"{folder} holds no adapter (no {CONFIGURATION_FILE})", "Give an adapter's folder")
    base = given or read_json(configuration).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{configuration} names no base model", "Give --student")
    return str(base)


def unit_records(plan: Plan, parts: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The record of every unit, in the plan's order, from the headers of its part."""
    return [read_record(parts[unit.key]) for unit in plan.units]


def tensor_records(units: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The record of every student tensor, each with its layer."""
    return [{**tensor, "layer": unit["layer"]} for unit in units for tensor in unit["tensors"]]


def is_nothing(tensors: Iterable[Mapping[str, Any]]) -> bool:
    """Whether every delta is exactly zero."""
    return not any(tensor.get("delta_norm") for tensor in tensors)


def summarise(tensors: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of fates, reasons, projections and alignments."""
    rows = list(tensors)
    return {
        "fates": dict(Counter(row["fate"] for row in rows)),
        "reasons_to_keep": dict(Counter(row["reason"] for row in rows if row["fate"] == "kept")),
        "projections": dict(Counter(row["projection"] for row in rows if "projection" in row)),
        "projection_fallbacks": {
            row["name"]: row["projection_fallback"] for row in rows if "projection_fallback" in row
        },
        "alignments": dict(Counter(row["alignment"] for row in rows if "alignment" in row)),
    }


def fates(
    student: Model,
    plan: Plan | None,
    units: Iterable[Mapping[str, Any]],
    results: Mapping[str, StageResult],
    whole: bool,
) -> list[dict[str, Any]]:
    """The fate of every tensor of the student, as the last stage that changed it has left it.

    Args:
        student: The student.
        plan: Of the weights stage, if there was one.
        units: Records of its units.
        results: Stages on text that were run, in order. On top of the weights stage one counts where it was kept.
        whole: Whether a changed head is saved whole.
    """
    tensors, reason = tensor_records(units), NOT_PAIRED
    reasons = dict(plan.ignored_student) if plan else {}
    for stage, result in results.items():
        reason = NOT_TRAINED if stage == "refined" else NOT_FITTED
        if plan is not None and stage == "calibrated" and not result.search.accepted:
            continue
        if result.head is None:
            reasons[student.architecture.head] = HEAD_STANDS_STILL
        rows = fitted_records(student, result, whole, stage)
        changed = {row["name"] for row in rows}
        tensors = [row for row in tensors if row["name"] not in changed] + rows
    return tensors + kept_records(student, [row["name"] for row in tensors], reason, reasons)


def fitted_records(student: Model, fitted: StageResult, whole: bool, stage: str) -> list[dict[str, Any]]:
    """The fate of every matrix that a stage on text changes: the head first, then those of the layers."""
    pairs = [_fitted_record(student, name, factors, stage) for name, factors in fitted.pairs.items()]
    if fitted.head is None:
        return pairs
    left, right = fitted.head.factors
    head = {
        "name": student.architecture.head,
        "role": "head",
        "shape": [left.shape[0], right.shape[1]],
        "fate": "lora",
        "rank": left.shape[1],
        "format": "whole" if whole else "pair",
        "stage": stage,
        "delta_norm": float(fitted.head.delta.double().norm()),
        "layer": None,
    }
    return [head, *pairs]


def _fitted_record(student: Model, name: str, factors: tuple[Tensor, Tensor], stage: str) -> dict[str, Any]:
    matrix = student.architecture.by_name.get(name)
    row: dict[str, Any] = {
        "name": name,
        "role": student.role_of(name),
        "shape": list(student.shapes[name] if matrix is None else matrix.shape),
        "fate": "lora",
        "rank": factors[0].shape[1],
        "stage": stage,
        "delta_norm": float((factors[0].float() @ factors[1].float()).double().norm()),
        "layer": None if matrix is None else matrix.part,
    }
    if not row["delta_norm"]:
        row["reason"] = "no gradient reached it: its pair is zero"
    return row if matrix is None or matrix.piece.index is None else row | {"expert": matrix.piece.index}


def kept_records(
    student: Model, named: Iterable[str], reason: str, reasons: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The fate of every stored tensor of the model of which no matrix has a record yet.

    Args:
        student: The student.
        named: Names of the matrices, or parts of matrices, that have one.
        reason: Why they are kept that could be changed.
        reasons: Stored tensor to a reason of its own.
    """
    architecture, meanings = student.architecture, student.layout.meanings
    known = set(named)
    known |= {meanings[name].view.stored for name in known if name in meanings}
    rows = []
    for part, sources in architecture.stored.of_part.items():
        for source in sources:
            inside = [m for slot in source.slots for m in architecture.parameters.get(slot.name, ())]
            if any(m.name in known and not m.stored for m in inside):
                continue
            against = [student.keys.left_out[m.name] for m in inside if m.name in student.keys.left_out]
            for _, name in source.hub_names:
                if name not in known:
                    known.add(name)
                    own = (reasons or {}).get(name) or student.keys.left_out.get(name)
                    why = own or (against[0] if against else reason)
                    rows.append(
                        {
                            "name": name,
                            "role": student.role_of(name),
                            "shape": list(student.shapes[name]),
                            "fate": "kept",
                            "reason": why,
                            "layer": part if isinstance(part, int) else None,
                        }
                    )
    return rows


def make_record(
    recipe: Recipe,
    pair: ModelPair,
    stages: Stages,
    plan: Plan | None,
    tensors: list[dict[str, Any]],
    execution: ExecutionSummary | None,
) -> dict[str, Any]:
    """The record without figures; the caller adds ``adapter_sha256``, ``scale_search`` and ``transferred``.

    Args:
        recipe: What was asked for.
        pair: Teacher and student.
        stages: What was run, and why.
        plan: Of the weights stage, if there was one.
        tensors: The fate of every student tensor.
        execution: How its units were computed.
    """
    settings = execution_settings(recipe)
    units = unit_records(plan, execution.parts) if plan and execution else []
    return {
        "schema": SCHEMA,
        "teacher": _model(pair.teacher),
        "student": _model(pair.student),
        "recipe": recipe.model_dump(mode="json"),
        "method": "+".join(stages.names),
        "method_choice": stages.as_dict(),
        "depth_map": [[layer, [list(step) for step in behind]] for layer, behind in enumerate(plan.depth)]
        if plan
        else [],
        "summary": summarise(tensors),
        "tensors": tensors,
        "units": [{key: value for key, value in unit.items() if key != "tensors"} for unit in units],
        "ignored_student_tensors": _ignored(pair.student, plan),
        "unused_teacher_tensors": dict(plan.unused_teacher) if plan else {},
        "notes": list(plan.notes) if plan else [],
        "execution": {
            "workers": settings.workers,
            "devices": list(settings.devices),
            "threads_per_worker": settings.threads_per_worker,
        }
        | (_executed(execution) if execution else {}),
        "timing": {"transfer_seconds": round(execution.seconds, 3) if execution else 0.0},
        "versions": {name: version(name) for name in (PROJECT, *NUMERIC_LIBRARIES, "transformers", "peft")}
        | {"python": platform.python_version()},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _ignored(student: Model, plan: Plan | None) -> dict[str, str]:
    """Stored tensors that no model is made of, with the reason."""
    known = {**student.layout.ignored, **(plan.ignored_student if plan else {})}
    return {
        name: known.get(name, "transformers makes no part of the decoder of it")
        for name in student.architecture.stored.unused
    }


def _executed(execution: ExecutionSummary) -> dict[str, Any]:
    return {
        "units_computed": execution.computed,
        "units_reused": execution.reused,
        "peak_anonymous_bytes_by_worker": {str(worker): peak for worker, peak in execution.peak_memory.items()},
    }


def _model(model: Model) -> dict[str, Any]:
    geometry = model.layout.geometry
    return {
        "source": model.checkpoint.source,
        "family": model.layout.model_type,
        "fingerprint": model.checkpoint.fingerprint(),
        "bytes": model.checkpoint.total_bytes,
        "layers": geometry.layers,
        "hidden": geometry.hidden,
        "experts": geometry.experts,
        "vocabulary": geometry.vocabulary,
    }
