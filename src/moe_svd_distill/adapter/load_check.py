"""Whether PEFT really loads an adapter: its own load path on a model without memory.

PEFT drops what it does not recognise without an error, so nothing else proves that an adapter does anything. The model
is built on the meta device from the student's config.json alone, and the adapter's tensors are stood in for by meta
tensors of the header's shapes: no weight is read and the check of a 100-billion-parameter student needs megabytes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter.adapter_file import CONFIGURATION_FILE, adapter_header, read_json, shapes_of
from moe_svd_distill.adapter.agreement import check_saved_modules
from moe_svd_distill.adapter.configuration import refuse_tied
from moe_svd_distill.adapter.pair_shapes import pair_shapes, whole_shapes
from moe_svd_distill.errors import BadDataError, DistillError, MissingInputError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

_NAME = "default"
_ACTION = "Make adapter_config.json again with adapter-config, or write the adapter again"


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


def check_loads(adapter_folder: Path | str, student: Mapping[str, Any] | Path | str) -> LoadReport:
    """Load an adapter by PEFT's own path and refuse it unless every key and every module found its partner.

    Args:
        adapter_folder: Folder with adapter_config.json and adapter_model.safetensors.
        student: The student's parsed config.json, or its folder.

    Returns:
        The report; ``missing`` and ``unexpected`` are empty.

    Raises:
        MissingInputError: A file is not there.
        BadDataError: A key is missing or unexpected, a shape differs, ``modules_to_save`` is not what the file holds
            whole, or the configuration is not PEFT's.
    """
    folder = Path(adapter_folder)
    shapes = shapes_of(adapter_header(folder))
    configuration, whole = _configuration(folder), whole_shapes(shapes)
    # Without its entry the key would fill the base model's own weight, and PEFT would report nothing.
    check_saved_modules(read_json(folder / CONFIGURATION_FILE), whole)
    model = _student_on_meta(student)
    if model.config.get_text_config().tie_word_embeddings:
        refuse_tied(pair_shapes(shapes), whole)
    report = _load(model, configuration, shapes)
    if set(report.replaced) != (expected := {name.removesuffix(".weight") for name in whole}):
        found = ", ".join(report.replaced) or "no module"
        raise BadDataError(f"PEFT replaces {found} whole, expected {', '.join(expected) or 'none'}", _ACTION)
    if report.unexpected:
        _refuse("PEFT would drop", report.unexpected, "no module of the student takes it")
    if report.missing:
        _refuse("the adapter leaves empty", report.missing, "the configuration targets it, but no key fills it")
    return report


def _refuse(what: str, keys: tuple[str, ...], why: str) -> None:
    more = f" and {len(keys) - 1} more keys" if len(keys) > 1 else ""
    raise BadDataError(f"{what} {keys[0]}{more}: {why}", _ACTION)


def _configuration(folder: Path) -> PeftConfig:
    from peft import PeftConfig

    path = folder / CONFIGURATION_FILE
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":
        raise BadDataError(f"{path}: peft_type is {fields.get('peft_type')!r}, expected 'LORA'", _ACTION)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        raise BadDataError(f"{path}: not a configuration that PEFT reads: {error}", _ACTION) from error


def _student_on_meta(student: Mapping[str, Any] | Path | str) -> PreTrainedModel:
    """The student as transformers builds it, without memory and without running code of the checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if isinstance(student, Mapping):
            fields = copy.deepcopy(dict(student))
            fields.pop("auto_map", None)
            config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        else:
            folder = Path(student)
            if not (folder / "config.json").is_file():
                raise MissingInputError(f"{folder / 'config.json'} is not there", "Give the student's folder")
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except DistillError:
        raise
    except Exception as error:
        raise BadDataError(
            f"transformers cannot build the student from its config.json: {error}", "Use the config.json of the model"
        ) from error


def _load(model: PreTrainedModel, configuration: PeftConfig, shapes: Mapping[str, tuple[int, ...]]) -> LoadReport:
    """What ``PeftModel.from_pretrained`` does after reading the tensors, on stand-ins of the same shapes."""
    import torch
    from peft import PeftModel, set_peft_model_state_dict

    stand_ins = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    try:
        with warnings.catch_warnings():
            # PEFT looks for rank patterns among modules only, and warns about those of parameters that it does use.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            # PEFT 0.21 still asks transformers for a property by its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            loaded = PeftModel(model, configuration, adapter_name=_NAME, low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(loaded, stand_ins, adapter_name=_NAME, low_cpu_mem_usage=True)
    except Exception as error:
        raise BadDataError(f"PEFT cannot load the adapter: {_first_line(error)}", _ACTION) from error
    scales = _scales(loaded)
    missing = tuple(key for key in result.missing_keys if _is_of_adapter(key))
    unexpected = tuple(result.unexpected_keys)
    return LoadReport(len(stand_ins), len(scales), scales, missing, unexpected, _replaced(loaded))


def _is_of_adapter(key: str) -> bool:
    return (".lora_" in key and f".{_NAME}" in key) or f".modules_to_save.{_NAME}." in key


def _first_line(error: Exception) -> str:
    """The first line of torch's list of size mismatches that names a key, or the whole message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    mismatches = [line for line in lines if line.startswith("size mismatch")]
    if mismatches:
        return mismatches[0] + (f" (and {len(mismatches) - 1} more)" if len(mismatches) > 1 else "")
    return " ".join(lines) or type(error).__name__


def _scales(loaded: PeftModel) -> dict[str, float]:
    """Name of each adapted module, or of the parameter below it, to the factor of ``B @ A``."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    scales = {}
    for name, module in loaded.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            plain = name.replace(".base_layer", "")
            parameter = f".{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
            scales[plain + parameter] = float(module.scaling[_NAME])
    return scales


def _replaced(loaded: PeftModel) -> tuple[str, ...]:
    """The modules that PEFT keeps a second copy of, to be used instead of the base model's."""
    from peft.utils import ModulesToSaveWrapper

    modules = loaded.base_model.model.named_modules()
    return tuple(name for name, module in modules if isinstance(module, ModulesToSaveWrapper))
