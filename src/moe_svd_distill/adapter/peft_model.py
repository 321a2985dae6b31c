"""PEFT asked: what it makes of a configuration, and where the tensors of an adapter arrive, on a model without memory.

PEFT drops what it does not recognise without an error, and rewrites names for some architectures; so what an adapter
does is never deduced from its names here, but seen in the model that PEFT has wrapped.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.architecture.building import build_on_meta
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.files.names import CONFIGURATION_FILE

NAME = "default"
MAKE_AGAIN = "Make adapter_config.json again with adapter-config, or write the adapter again"


@dataclass(frozen=True, eq=False)
class LoraTarget:
    """What PEFT has put around one parameter.

    Attributes:
        parameter: The parameter's name in the model as it was before.
        layer: PEFT's module.
        module: What PEFT calls it; its keys in an adapter's file begin so.
        embedding: Whether its factors are named ``lora_embedding_A`` and ``lora_embedding_B``.
    """

    parameter: str
    layer: Any
    module: str
    embedding: bool

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """``(A, B)`` as PEFT holds them."""
        if self.embedding:
            return self.layer.lora_embedding_A[NAME], self.layer.lora_embedding_B[NAME]
        return self.layer.lora_A[NAME].weight, self.layer.lora_B[NAME].weight

    @property
    def scale(self) -> float:
        """The factor of ``B @ A``."""
        return float(self.layer.scaling[NAME])


def read_configuration(folder: Path) -> Any:
    """An adapter's adapter_config.json as PEFT reads it.

    Raises:
        MissingInputError: There is none.
        BadDataError: PEFT does not read it, or it is of another kind than LoRA.
    """
    from peft import PeftConfig

    path = folder / CONFIGURATION_FILE
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":
        raise BadDataError(f"{path}: peft_type is {fields.get('peft_type')!r}, expected 'LORA'", MAKE_AGAIN)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        raise BadDataError(f"{path}: not a configuration that PEFT reads: {error}", MAKE_AGAIN) from error


def lora_config(fields: Mapping[str, object]) -> Any:
    """The content of an adapter_config.json as PEFT's object."""
    from peft import LoraConfig

    return LoraConfig(**{name: value for name, value in fields.items() if name != "peft_type"})


def wrap(model: Any, configuration: Any) -> Any:
    """A model on the meta device as PEFT wraps it, changed in place; its factors have no memory.

    Raises:
        BadDataError: PEFT refuses the configuration.
    """
    from peft import PeftModel

    try:
        with torch.device("meta"), _settled_warnings():
            return PeftModel(model, copy.deepcopy(configuration), adapter_name=NAME, low_cpu_mem_usage=True)
    except Exception as error:
        raise BadDataError(f"PEFT cannot load the adapter: {first_line(error)}", MAKE_AGAIN) from error


def wrap_student(architecture: Architecture, configuration: Any, dtype: torch.dtype | None = None) -> Any:
    """A model without memory of the student, as PEFT wraps it; errors as of `wrap`."""
    source, text_only = architecture.checkpoint.source, architecture.text_only
    return wrap(build_on_meta(architecture.config, source, dtype, text_only=text_only), configuration)


def hold_values(wrapped: Any) -> None:
    """Let loaded factors keep their values, which PEFT moves to where the base weight lies: that has no memory."""
    for target in lora_targets(wrapped):
        base, attribute = target.layer.get_base_layer(), target.parameter.rpartition(".")[2]
        base._parameters[attribute] = nn.Parameter(torch.empty(0), requires_grad=False)


def modules_of(architecture: Architecture, configuration: Mapping[str, object]) -> dict[str, str]:
    """Parameter to what PEFT calls it, for a configuration of an adapter.

    Raises:
        BadDataError: PEFT refuses the configuration.
    """
    wrapped = wrap_student(architecture, lora_config(configuration))
    return {target.parameter: target.module for target in lora_targets(wrapped)}


def load(wrapped: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Let PEFT fill a wrapped model, as ``PeftModel.from_pretrained`` does after it has read the tensors.

    Returns:
        PEFT's lists of missing and unexpected keys.

    Raises:
        BadDataError: A shape differs, or PEFT cannot take what it is given.
    """
    from peft import set_peft_model_state_dict

    try:
        with _settled_warnings():
            return set_peft_model_state_dict(wrapped, dict(tensors), adapter_name=NAME, low_cpu_mem_usage=True)
    except Exception as error:
        raise BadDataError(f"PEFT cannot load the adapter: {first_line(error)}", MAKE_AGAIN) from error


def lora_targets(wrapped: Any) -> Iterator[LoraTarget]:
    """Everything that PEFT has put a pair around."""
    from peft.tuners.lora import Embedding, LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            attribute = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            parameter = f"{name.replace('.base_layer', '')}.{attribute}"
            yield LoraTarget(parameter, module, name, isinstance(module, Embedding))


def replaced_modules(wrapped: Any) -> tuple[str, ...]:
    """The modules that PEFT keeps a second copy of, to be used instead of the base model's."""
    from peft.utils import ModulesToSaveWrapper

    modules = wrapped.base_model.model.named_modules()
    return tuple(name for name, module in modules if isinstance(module, ModulesToSaveWrapper))


def first_line(error: Exception) -> str:
    """The first line of torch's list of size mismatches that names a key, or the whole message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    mismatches = [line for line in lines if line.startswith("size mismatch")]
    if mismatches:
        return mismatches[0] + (f" (and {len(mismatches) - 1} more)" if len(mismatches) > 1 else "")
    return " ".join(lines) or type(error).__name__


@contextmanager
def _settled_warnings() -> Iterator[None]:
    """PEFT warns about names that it does use, such as rank patterns of parameters; what counts is checked after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
