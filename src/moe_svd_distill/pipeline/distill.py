"""Distil: two models and a recipe in, a checked adapter out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter import build_configuration, check_loads, lora_keys
from moe_svd_distill.errors import BadDataError, CannotWriteError, MissingInputError, NothingToTransferError
from moe_svd_distill.execution.consolidation import consolidate
from moe_svd_distill.execution.events import Event
from moe_svd_distill.execution.publish import OutputFolder, write_json_atomic, write_text_atomic
from moe_svd_distill.execution.supervisor import Settings, execute
from moe_svd_distill.execution.tensor_file import read_header
from moe_svd_distill.pairing.plan import Plan
from moe_svd_distill.pipeline.pair import ModelPair, open_pair
from moe_svd_distill.pipeline.preparation import execution_settings, make_work, prepare
from moe_svd_distill.pipeline.record import is_nothing, make_record, tensor_records, unit_records
from moe_svd_distill.pipeline.scale import ScaleDecision, SearchText, decide_scale, not_searched, read_search_text
from moe_svd_distill.recipe import Recipe
from moe_svd_distill.report.card import adapter_card

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = "adapter_model.safetensors"
CONFIGURATION = "adapter_config.json"
MANIFEST = "run.json"
CARD = "README.md"


@dataclass(frozen=True)
class Listener:
    """Who is told how a run goes; every callback is optional.

    Attributes:
        on_plan: Told the number of units and their total cost before work begins.
        on_event: Told every event of the workers.
        on_stage: Told the name of each later stage, and a fraction done or None.
    """

    on_plan: Callable[[list[tuple[str, int]]], None] = field(default=lambda units: None)
    on_event: Callable[[Event], None] = field(default=lambda event: None)
    on_stage: Callable[[str, float | None], None] = field(default=lambda name, fraction: None)


@dataclass(frozen=True)
class Adapter:
    """A published adapter.

    Attributes:
        folder: Where it lies.
        record: The content of run.json.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Digest of adapter_model.safetensors."""
        return str(self.record["adapter_sha256"])

    @property
    def transferred(self) -> bool | None:
        """Whether anything was transferred: None where no calibration text was given, so nobody knows."""
        return self.record["transferred"]


def distill(recipe: Recipe, listener: Listener | None = None) -> Adapter:
    """Run a recipe; goes on where an earlier run with the same output stopped.

    Args:
        recipe: What is asked for.
        listener: Who is told how it goes.

    Raises:
        DistillError: One of its kinds, each with its exit code; nothing half-written is left looking complete.
        NothingToTransferError: Every delta is exactly zero.
    """
    listener = listener or Listener()
    settings = execution_settings(recipe)
    _refuse_foreign_folder(recipe.output)
    with open_pair(recipe.teacher, recipe.student) as pair:
        plan = prepare(recipe, pair, settings)
        searching = bool(recipe.calibration) and recipe.scale_search
        text = read_search_text(recipe, pair, settings.devices[0]) if searching else None
        with OutputFolder(recipe.output) as output:
            listener.on_plan([(unit.label, unit.cost) for unit in plan.units])
            summary = execute(plan.units, make_work(recipe, pair), output.parts, settings, listener.on_event)
            _refuse_changed_models(plan, recipe, pair, settings)
            units = unit_records(plan, summary.parts)
            if is_nothing(tensor_records(units)):
                raise NothingToTransferError(
                    f"every delta between {recipe.teacher} and {recipe.student} is exactly zero, so the adapter would "
                    "do nothing and is not written",
                    "Choose a teacher that differs from the student",
                )
            parts = [summary.parts[unit.key] for unit in plan.units]
            listener.on_stage("writing the adapter", None)
            digest = _stage_adapter(output, parts, recipe, pair, ScaleDecision.keep())
            listener.on_stage("checking that PEFT loads it", None)
            check_loads(output.staged(ADAPTER).parent, pair.student.checkpoint.folder)
            decision = _scale(output, recipe, pair, text, settings.devices[0], listener)
            if decision.changes:
                digest = _stage_adapter(output, parts, recipe, pair, decision)
            record = make_record(recipe, pair, plan, units, summary, settings) | {
                "adapter_sha256": digest,
                "transferred": decision.transferred,
                "scale_search": decision.as_dict(),
            }
            write_text_atomic(output.staged(CARD), adapter_card(record))
            write_json_atomic(output.staged(MANIFEST), record)
            output.publish()
    return Adapter(recipe.output, record)


def load_adapter(folder: Path) -> Adapter:
    """A published adapter.

    Raises:
        MissingInputError: The folder holds none.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise MissingInputError(
            f"{folder} holds no finished adapter (no {MANIFEST})", "Run moe-svd-distill distill with this --output"
        )
    return Adapter(folder, json.loads(manifest.read_text(encoding="utf-8")))


def _scale(
    output: OutputFolder, recipe: Recipe, pair: ModelPair, text: SearchText | None, device: str, listener: Listener
) -> ScaleDecision:
    if text is None:
        reason = "recipe: scale_search: false" if recipe.calibration else "no calibration text was given"
        return not_searched(reason)
    stage = "searching the scale on calibration text"
    listener.on_stage(stage, 0.0)
    staged = output.staged(ADAPTER).parent
    return decide_scale(staged, pair, text, device, lambda fraction: listener.on_stage(stage, fraction))


def _stage_adapter(
    output: OutputFolder, parts: list[Path], recipe: Recipe, pair: ModelPair, decision: ScaleDecision
) -> str:
    """Write adapter and configuration to the staging area; returns the adapter's sha256."""
    layout = pair.student.layout
    slots = [slot for part in parts for slot in read_header(part).slots]
    configuration = build_configuration(
        {_peft_key(slot.name): slot.shape for slot in slots},
        layout.family,
        base_model=_base_model(pair),
        student_layers=layout.geometry.layers,
        tied_embeddings=layout.geometry.tied_embeddings,
    )
    # PEFT multiplies B·A by alpha / r. With an alpha of the user's own, B carries the inverse: the product stays.
    peft_scale = 1.0 if recipe.alpha is None else recipe.alpha / configuration["r"]
    if recipe.alpha is not None:
        scaled = {key: rank * peft_scale for key, rank in configuration["alpha_pattern"].items()}
        configuration |= {"lora_alpha": recipe.alpha, "alpha_pattern": scaled}

    def scale(key: str, tensor: Tensor) -> Tensor:
        return tensor * (decision.factor_of(key) / peft_scale) if _is_b(key) else tensor

    unchanged = peft_scale == 1.0 and not decision.changes
    digest = consolidate(parts, output.staged(ADAPTER), rename=_peft_key, scale=None if unchanged else scale)
    write_json_atomic(output.staged(CONFIGURATION), configuration)
    return digest


def _peft_key(name: str) -> str:
    hub_name, _, side = name.rpartition("#")
    key_a, key_b = lora_keys(hub_name)
    return key_a if side == "A" else key_b


def _is_b(key: str) -> bool:
    return key.endswith((".lora_B.weight", ".lora_embedding_B"))


def _base_model(pair: ModelPair) -> str:
    source = pair.student.checkpoint.source
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source.partition("@")[0]


def _refuse_foreign_folder(folder: Path) -> None:
    """Refuse to write into a folder that holds something else than an earlier run."""
    if folder.exists() and not folder.is_dir():
        raise CannotWriteError(f"output {folder} is a file, expected a folder", "Choose another --output")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    if names and not names & {MANIFEST, "parts", ".lock"}:
        raise CannotWriteError(
            f"output {folder} is not empty and holds no earlier run (found {sorted(names)[0]})",
            "Choose another --output",
        )


def _refuse_changed_models(plan: Plan, recipe: Recipe, pair: ModelPair, settings: Settings) -> None:
    """The models must be at the end what they were at the beginning."""
    again = prepare(recipe, pair, settings)
    if [unit.key for unit in again.units] != [unit.key for unit in plan.units]:
        raise BadDataError("a model's files changed during the run", "Run the same command again")
