"""What a run leaves: its record, run.json (what was asked, what became of every tensor, with which versions), and the
adapter beside it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.errors import MissingInputError, UsageError
from moe_svd_distill.execution.parts import read_record
from moe_svd_distill.execution.supervisor import ExecutionSummary
from moe_svd_distill.files.names import CARD_FILE, CONFIGURATION_FILE, RECORD_FILE
from moe_svd_distill.files.typed import as_json
from moe_svd_distill.pairing.plan import Pairing
from moe_svd_distill.pipeline.assembly import head_is_whole
from moe_svd_distill.pipeline.fates import fates, summarise
from moe_svd_distill.pipeline.pair import Model, ModelPair
from moe_svd_distill.pipeline.placement import available_cores, execution_settings
from moe_svd_distill.pipeline.scale import combined_decision
from moe_svd_distill.pipeline.texts import RunText
from moe_svd_distill.pipeline.units import NUMERIC_LIBRARIES, PROJECT
from moe_svd_distill.recipe import Recipe
from moe_svd_distill.report.record import ModelRecord, RunRecord

if TYPE_CHECKING:
    from moe_svd_distill.evaluation.scale_search import ScaleDecision
    from moe_svd_distill.pipeline.method import Stages
    from moe_svd_distill.pipeline.stage import StageResult
    from moe_svd_distill.transfer.facts import UnitFacts

SCHEMA = 1


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


def unit_records(plan: Pairing, execution: ExecutionSummary) -> list[UnitFacts]:
    """The record of every unit, in the plan's order, from the headers of its part."""
    return [cast("UnitFacts", read_record(execution.parts[unit.key])) for unit in plan.units]


def make_record(
    recipe: Recipe,
    pair: ModelPair,
    stages: Stages,
    plan: Pairing | None,
    execution: ExecutionSummary | None,
    results: Mapping[str, StageResult],
) -> Mapping[str, object]:
    """The record of a run without what `facts_of_text` says.

    Args:
        recipe: What was asked for.
        pair: Teacher and student.
        stages: What was run, and why.
        plan: Of the weights stage, if there was one.
        execution: How its units were computed.
        results: Stages on text that were run, in order.
    """
    settings = execution_settings(recipe)
    units = unit_records(plan, execution) if plan and execution else []
    tensors = fates(pair.student, plan, units, results, head_is_whole(recipe, pair))
    return {
        "schema": SCHEMA,
        "teacher": as_json(_model(pair.teacher)),
        "student": as_json(_model(pair.student)),
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
            "machine": {
                "system": platform.platform(),
                "processor": platform.processor() or platform.machine(),
                "cores": available_cores(),
                "devices": _names_of(settings.devices),
            },
        }
        | (_executed(execution) if execution else {}),
        "timing": {"transfer_seconds": round(execution.seconds, 3) if execution else 0.0},
        "versions": {name: version(name) for name in (PROJECT, *NUMERIC_LIBRARIES, "transformers", "peft")}
        | {"python": platform.python_version()},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def facts_of_text(
    text: RunText | None, weights: ScaleDecision | None, results: Mapping[str, StageResult]
) -> Mapping[str, object]:
    """What was read, how the stages on text went, and the scales.

    Args:
        text: All that the run reads; None for nothing.
        weights: Scales of the weights stage, if there was one.
        results: Stages on text that were run.
    """
    calibrated, refined = results.get("calibrated"), results.get("refined")
    scale = combined_decision(weights, calibrated, refined)
    used = {  # what an evaluation has to leave out
        "used_documents": text.used_documents if text else [],
        "used_groups": text.used_groups if text else [],
    }
    return {
        "calibration": {**(text.record() if text else {}), **(calibrated.record if calibrated else {})},
        **({"refinement": refined.record} if refined else {}),
        "transferred": None if scale.kind is None else scale.accepted,
        "scale_search": {**scale.as_dict(), **used},
    }


def _names_of(devices: Sequence[str]) -> list[str]:
    import torch

    return [torch.cuda.get_device_name(device) if device.startswith("cuda") else device for device in devices]


def _ignored(student: Model, plan: Pairing | None) -> dict[str, str]:
    """Stored tensors that no model is made of, with the reason."""
    known = {**student.layout.ignored, **(plan.ignored_student if plan else {})}
    return {
        name: known.get(name, "transformers makes no part of the decoder of it")
        for name in student.architecture.stored.unused
    }


def _executed(execution: ExecutionSummary) -> dict[str, object]:
    return {
        "units_computed": execution.computed,
        "units_reused": execution.reused,
        "peak_anonymous_bytes_by_worker": {str(worker): peak for worker, peak in execution.peak_memory.items()},
    }


def _model(model: Model) -> ModelRecord:
    geometry = model.layout.geometry
    return ModelRecord(
        source=model.checkpoint.source,
        family=model.layout.model_type,
        fingerprint=model.checkpoint.fingerprint(),
        bytes=model.checkpoint.total_bytes,
        layers=geometry.layers,
        hidden=geometry.hidden,
        experts=geometry.experts,
        vocabulary=geometry.vocabulary,
        license=_licence(model.checkpoint.folder / CARD_FILE),
        notes=tuple(model.checkpoint.notes),
    )


def _licence(card: Path) -> str | None:
    """What a model's own card names; a card that cannot be read names none."""
    import yaml

    try:
        _, front, *_ = card.read_text(encoding="utf-8").split("---", 2)
        named = yaml.safe_load(front).get("license")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    return named if isinstance(named, str) else None
