"""Whether PEFT really loads an adapter: its own load path on a model without memory.

PEFT drops what it does not recognise without an error, so nothing else proves that an adapter does anything. The model
is built on the meta device from the student's config.json alone, and the adapter's tensors are stood in for by meta
tensors of the header's shapes: no weight is read and the check of a 100-billion-parameter student needs megabytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_svd_distill.adapter.adapter_file import adapter_header, read_json, shapes_of
from moe_svd_distill.adapter.pair_shapes import whole_modules
from moe_svd_distill.adapter.peft_model import NAME, load, lora_targets, read_configuration, replaced_modules, wrap
from moe_svd_distill.architecture.building import build_on_meta, parse_config
from moe_svd_distill.errors import BadDataError, MissingInputError
from moe_svd_distill.files.names import CONFIGURATION_FILE

_ACTION = "Make adapter_config.json again with adapter-config, or write the adapter again"
_UNSUPPORTED = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "ensure_weight_tying": (False, None),
    "exclude_modules": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
}


@dataclass(frozen=True)
class LoadReport:
    """What PEFT did with an adapter.

    Attributes:
        keys: Tensors in the adapter's file.
        targets: Modules and parameters of the loaded model that received a pair.
        scales: Name of each of them to the factor PEFT multiplies ``B @ A`` by.
        missing: LoRA weights of the loaded model that no key filled; they would stay at PEFT's start values.
        unexpected: Keys that found no place in the loaded model; PEFT would drop them.
        replaced: Modules of the loaded model whose weight is replaced whole.
    """

    keys: int
    targets: int
    scales: Mapping[str, float]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    replaced: tuple[str, ...] = ()


def check_loads(
    adapter_folder: Path | str, student: Mapping[str, Any] | Path | str, *, text_only: bool = False
) -> LoadReport:
    """Load an adapter by PEFT's own path and refuse it unless every key and every module found its partner.

    Args:
        adapter_folder: Folder with adapter_config.json and adapter_model.safetensors.
        student: The student's parsed config.json, or its folder.
        text_only: Whether it is for the student's class for text alone.

    Returns:
        The report; ``missing`` and ``unexpected`` are empty.

    Raises:
        MissingInputError: A file is not there.
        BadDataError: A key is missing or unexpected, a shape differs, ``modules_to_save`` is not what the file holds
            whole, the configuration is not PEFT's, or it asks for more than plain pairs, such as DoRA.
    """
    folder = Path(adapter_folder)
    shapes = shapes_of(adapter_header(folder))
    fields, whole = read_json(folder / CONFIGURATION_FILE), whole_modules(shapes)
    configuration = read_configuration(folder)
    check_options(fields, whole)
    if isinstance(student, Mapping):
        config, source = dict(student), "the student"
    else:
        if not (Path(student) / "config.json").is_file():
            raise MissingInputError(f"{Path(student) / 'config.json'} is not there", "Give the student's folder")
        config, source = read_json(Path(student) / "config.json"), str(student)
    model = build_on_meta(parse_config(config, source), source, text_only=text_only)
    tied_ends = _ends(model) if getattr(model, "all_tied_weights_keys", None) and not whole else set()
    wrapped = wrap(model, configuration)
    targets = {target.parameter.removesuffix(".weight"): target for target in lora_targets(wrapped)}
    _refuse_tied(tied_ends.intersection(targets))
    # Without its entry a key would fill the base model's own weight, and PEFT would report nothing.
    if set(replaced := replaced_modules(wrapped)) != set(whole):
        found = ", ".join(replaced) or "no module"
        raise BadDataError(
            f"PEFT replaces {found} whole (modules_to_save), expected {', '.join(whole) or 'none'}", _ACTION
        )
    result = load(wrapped, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    if unexpected := tuple(result.unexpected_keys):
        _refuse("PEFT would drop", unexpected, "no module of the student takes it")
    if missing := tuple(key for key in result.missing_keys if _is_of_adapter(key)):
        _refuse("the adapter leaves empty", missing, "the configuration targets it, but no key fills it")
    scales = {name: target.scale for name, target in targets.items()}
    return LoadReport(len(shapes), len(scales), scales, missing, unexpected, replaced)


def check_options(fields: Mapping[str, Any], whole: Collection[str]) -> None:
    """Refuse what an adapter_config.json asks for beyond plain pairs, as far as that shows without the student.

    Args:
        fields: Its content.
        whole: The modules that the adapter's file holds whole.

    Raises:
        BadDataError: An option is not supported, or ``modules_to_save`` names something else.
    """
    for option, plain in _UNSUPPORTED.items():
        if fields.get(option, plain[0]) not in plain:
            raise BadDataError(f"adapter_config.json: {option} is {fields[option]!r}, expected {plain[0]!r}", _ACTION)
    named = fields.get("modules_to_save") or []
    matched = {(module, entry) for module in whole for entry in named if module.endswith(entry)}
    if {module for module, _ in matched} != set(whole) or {entry for _, entry in matched} != set(named):
        raise BadDataError(
            f"adapter_config.json: modules_to_save is {fields.get('modules_to_save')!r}, expected "
            f"{[module.rpartition('.')[2] for module in whole] or None}",
            _ACTION,
        )


def _refuse(what: str, keys: tuple[str, ...], why: str) -> None:
    more = f" and {len(keys) - 1} more keys" if len(keys) > 1 else ""
    raise BadDataError(f"{what} {keys[0]}{more}: {why}", _ACTION)


def _ends(model: Any) -> set[str]:
    """Names of the embeddings and the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name for name, module in model.named_modules() if any(module is end for end in ends)}


def _refuse_tied(names: set[str]) -> None:
    """Merged by PEFT, a pair of one of two matrices that are the same changes both."""
    for name in sorted(names):
        raise BadDataError(
            f"{name} has a LoRA pair, but the student ties its head to its embeddings: merged by PEFT it would change "
            "both",
            "Save the head whole (modules_to_save), or leave embeddings and head out of the transfer",
        )


def _is_of_adapter(key: str) -> bool:
    return (".lora_" in key and f".{NAME}" in key) or f".modules_to_save.{NAME}." in key
