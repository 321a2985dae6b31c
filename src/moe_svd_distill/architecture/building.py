"""From a config.json to the model that transformers builds of it, without memory for its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moe_svd_distill.errors import BadDataError, IncompatiblePairError, reason_of

_REPORT = "Report the architecture to the project"
_NOT_OF_THE_MODEL = frozenset({"auto_map", "quantization_config", "compression_config"})


def parse_config(config: Mapping[str, object], source: str) -> Any:
    """A config.json as transformers understands it; code that it names is never run.

    Raises:
        BadDataError: transformers does not.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = _plain(config)
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise BadDataError(
            f"{source}: config.json says model_type {model_type!r}, which the installed transformers does not know",
            "Install a newer transformers, or convert the model to an architecture it knows",
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:
        raise _not_built(source, error) from error


def _plain(value: Any) -> Any:
    """A copy without what describes stored weights or names code, and with the numbers JSON has no sign for."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(inner) for key, inner in value.items() if key not in _NOT_OF_THE_MODEL}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else copy.deepcopy(value)


def model_class(parsed: Any, *, text_only: bool = False) -> Any:
    """The class that a checkpoint says it is (what its users load, and names its tensors), or that for its text alone.

    Raises:
        IncompatiblePairError: transformers has no such class for it.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for name in () if text_only else (parsed.architectures or ()):
        found = getattr(transformers, name, None)
        if found is not None and "For" in name and hasattr(found, "get_output_embeddings"):
            return found
    kind = type(parsed.get_text_config()) if text_only else type(parsed)
    order = [auto.MODEL_FOR_CAUSAL_LM_MAPPING]
    if not text_only:
        order += [auto.MODEL_FOR_MULTIMODAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    for mapping in order:
        if kind in mapping:
            found = mapping[kind]
            return found[0] if isinstance(found, tuple) else found
    raise IncompatiblePairError(
        f"transformers has no {'text-only ' if text_only else ''}language model for model_type {parsed.model_type}",
        "Use the class of the checkpoint" if text_only else "Use a causal language model",
    )


def build_on_meta(parsed: Any, source: str, dtype: torch.dtype | None = None, *, text_only: bool = False) -> Any:
    """The model of a configuration, without memory for its weights.

    Raises:
        BadDataError: transformers cannot build it.
        IncompatiblePairError: transformers has no class for it.
    """
    kind = model_class(parsed, text_only=text_only)
    config = parsed if isinstance(parsed, kind.config_class) else parsed.get_text_config()
    options = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"):
            return kind._from_config(config, **options)
    except Exception as error:
        raise _not_built(source, error) from error


def _not_built(source: str, error: Exception) -> BadDataError:
    reason = reason_of(error)
    return BadDataError(
        f"transformers cannot build {source} from its config.json: {reason}", "Use the config.json of the model"
    )


def find_decoder(model: Any) -> tuple[Any, nn.ModuleList, str]:
    """The text decoder of a model, its list of layers and the list's name in it.

    The layers are the list of modules with most weights, the decoder the smallest module that holds both them and the
    token embeddings.

    Raises:
        IncompatiblePairError: There is no such list.
    """
    start = model
    while (inner := start.get_decoder() if hasattr(start, "get_decoder") else start) is not start:
        start = inner
    embeddings = embeddings_of(start, model)
    lists = {
        name: module
        for name, module in start.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(True for _ in module.parameters())
    }
    outermost = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    }
    if not outermost:
        raise IncompatiblePairError(f"{type(model).__name__} has no list of decoder layers", _REPORT)
    path, layers = max(outermost.items(), key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    names = path.split(".")
    for end in range(len(names) - 1, -1, -1):
        owner = start.get_submodule(".".join(names[:end]))
        if any(module is embeddings for module in owner.modules()):
            return owner, layers, ".".join(names[end:])
    return start, layers, path


def embeddings_of(decoder: Any, model: Any) -> nn.Module:
    found = decoder.get_input_embeddings() if hasattr(decoder, "get_input_embeddings") else None
    return found if found is not None else model.get_input_embeddings()


class ModuleProxy(nn.Module):
    """Shows the attributes of the module it stands for: decoders ask their layers for their kind, for example."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_original", original)  # not as a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_original"), name)
