"""A causal language model as transformers builds it, without memory for its weights.

Weights are put into places of the skeleton part by part and taken out again. A part is one decoder layer (its number),
the token embeddings, the head, or the rest of the decoder: final norm, position tables and the like.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moe_svd_distill.errors import BadDataError, IncompatiblePairError

Part: TypeAlias = int | str
EMBEDDING, ENDS, HEAD, OUTSIDE = "embedding", "ends", "head", "outside"

_REPORT = "Report the architecture to the project"


@dataclass(frozen=True, eq=False)
class Place:
    """Where one tensor belongs. The module stays the same when PEFT wraps it."""

    name: str
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    part: Part

    def fill(self, tensor: Tensor) -> None:
        """Put the tensor's values in, without a copy."""
        if self.is_buffer:
            self.module._buffers[self.attribute] = tensor
        else:
            self.module._parameters[self.attribute] = nn.Parameter(tensor, requires_grad=False)

    def clear(self) -> None:
        """Let go of the values."""
        self.fill(torch.empty(self.shape, dtype=self.dtype, device="meta"))


class Skeleton:
    """The model on the meta device, its decoder and its places.

    Attributes:
        model: The causal language model.
        decoder: What turns token ids into final hidden states.
        layers: The decoder's list of layers; its entries are exchanged while the decoder runs.
        originals: The layers themselves.
        prefix: Name of a layer in memory, up to its number.
        rules: transformers' renamings and operations between stored names and names in memory.
        embedding: The module of the token embeddings, and `embedding_name` its name in the decoder.
        head: The module of the output head, if there is one.
        places: Name in memory to place, for every parameter and every buffer that a checkpoint holds.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model, self.dtype = model, dtype
        self.decoder, self.layers, list_name = _layer_list(model)
        self.originals: tuple[nn.Module, ...] = tuple(self.layers)
        names = {id(module): name for name, module in model.named_modules()}
        base = names[id(self.decoder)]
        self.prefix = f"{base}.{list_name}." if base else f"{list_name}."
        self.rules: list[Any] = get_model_conversion_mapping(model)
        self.embedding: nn.Module = model.get_input_embeddings()
        self.embedding_name = next((name for name, m in self.decoder.named_modules() if m is self.embedding), None)
        self.head: nn.Module | None = model.get_output_embeddings()
        self.places: dict[str, Place] = {}
        inside = {id(module) for module in self.decoder.modules()}
        precise = _kept_precise(model, dtype)
        for path, module in model.named_modules(remove_duplicate=False):
            for attribute, tensor, is_buffer in _persistent(module):
                name = f"{path}.{attribute}" if path else attribute
                wide = precise is not None and precise.search(name) is not None
                part = self._part(name, module, id(module) in inside)
                kind = torch.float32 if wide else tensor.dtype
                self.places[name] = Place(name, module, attribute, tuple(tensor.shape), kind, is_buffer, part)

    @property
    def vocabulary(self) -> int:
        """Token ids that the embeddings have a row for."""
        return next(place.shape[0] for place in self.of_part(EMBEDDING) if place.attribute == "weight")

    def part_of_name(self, name: str) -> Part:
        """The part that a name in memory belongs to by its look, for names that have no place here."""
        number = re.match(re.escape(self.prefix) + r"(\d+)\.", name)
        return int(number[1]) if number else OUTSIDE

    def of_part(self, part: Part) -> list[Place]:
        """The places of a part."""
        return [place for place in self.places.values() if place.part == part]

    def clear(self, part: Part) -> None:
        """Let go of all weights of a part."""
        for place in self.of_part(part):
            place.clear()

    def _part(self, name: str, module: nn.Module, in_decoder: bool) -> Part:
        if module is self.embedding:
            return EMBEDDING
        if module is self.head:
            return HEAD
        if not in_decoder:
            return OUTSIDE
        number = self.part_of_name(name)
        return ENDS if number == OUTSIDE else number


def parse_config(config: Mapping[str, Any], source: str) -> Any:
    """A config.json as transformers understands it; code that it names is never run.

    Raises:
        BadDataError: transformers does not.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = copy.deepcopy(dict(config))
    for key in ("auto_map", "quantization_config", "compression_config"):
        fields.pop(key, None)
    try:
        return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except Exception as error:
        raise _not_built(source, error) from error


def layer_count(parsed: Any) -> int:
    """Decoder layers of a parsed configuration."""
    return int(parsed.get_text_config().num_hidden_layers)


def build_skeleton(
    config: Mapping[str, Any], source: str, dtype: torch.dtype, kind: str, *, gradients: bool = False
) -> Skeleton:
    """The model from its configuration alone.

    Args:
        config: The content of config.json.
        source: What to call the model in an error.
        dtype: Type to compute in.
        kind: Kind of device to compute on, as ``torch.device.type``.
        gradients: Whether gradients by the weights of experts will be asked for.

    Raises:
        BadDataError: transformers cannot build it, or does not build some buffer without the checkpoint.
        IncompatiblePairError: The decoder has no single list of layers.
    """
    from transformers import AutoModelForCausalLM

    parsed = parse_config(config, source)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise _not_built(source, error) from error
    if kind == "cpu" and not gradients and hasattr(model, "set_experts_implementation"):
        # On a CPU the loop over experts is 1.7 times as fast as grouped_mm, and 20 times as fast as batched_mm. Not so
        # on the way back: there the loop makes a gradient of all experts for each one of them.
        model.set_experts_implementation("eager")
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    model.eval().requires_grad_(False)
    _rebuild_buffers(model, source)
    return Skeleton(model, dtype)


def _not_built(source: str, error: Exception) -> BadDataError:
    reason = str(error).strip().split("\n", 1)[0]
    return BadDataError(
        f"transformers cannot build {source} from its config.json: {reason}", "Use the config.json of the model"
    )


def _layer_list(model: Any) -> tuple[Any, nn.ModuleList, str]:
    """The decoder, its list of layers and the list's name: in the decoder that the model names, else anywhere."""
    count = layer_count(model.config)
    found: list[tuple[Any, nn.ModuleList, str]] = []
    for owners in ([model.get_decoder()], list(model.modules())):
        found = [
            (owner, module, name)
            for owner in owners
            for name, module in owner.named_children()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if found:
            break
    if len(found) != 1:
        raise IncompatiblePairError(
            f"{type(model).__name__} has {len(found)} lists of {count} layers, expected one", _REPORT
        )
    return found[0]


def _persistent(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """The module's own tensors that a checkpoint holds."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, False
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer, True


def _kept_precise(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What transformers keeps in float32 whatever the model's type is, such as the correction bias of a router."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    patterns = [key.replace("*", ".*") for key, kind in plan.items() if kind == torch.float32]
    return re.compile("|".join(patterns)) if patterns else None


def _rebuild_buffers(model: Any, source: str) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, embedding scales) by the model's own code.

    They are filled twice over different values: what stays different was not computed.
    """
    own = [
        (path, module, name)
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    ]
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # transformers would draw random weights for the rest
    results = []
    for value in (0, 1):
        for _, module, name in own:
            empty = module._buffers[name]
            module._buffers[name] = torch.full(empty.shape, value, dtype=empty.dtype, device="cpu")
        for module in model.modules():
            module._is_hf_initialized = False
        with torch.no_grad():
            model.initialize_weights()
        results.append([module._buffers[name] for _, module, name in own])
    for (path, _, name), first, second in zip(own, *results, strict=True):
        if not torch.equal(first, second):
            raise BadDataError(f"transformers does not compute the buffer {path}.{name} of {source}", _REPORT)
