"""An adapter around a skeleton, exactly as PEFT loads it, one part at a time.

PEFT wraps the skeleton once, without memory. For each part its own loading code then sees the tensors of this part
alone. Parameters that PEFT adapts in place (fused experts, routers) get ``W + s·BA`` once, by PEFT's ``merge``, instead
of once for every batch; what has layers of its own stays beside the weight, so that bf16 rounds nothing away.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moe_svd_distill.adapter.adapter_file import adapter_header, read_tensor
from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.architecture.skeleton import HEAD, OUTSIDE, Part, Skeleton
from moe_svd_distill.architecture.stored import CheckpointMap, in_memory
from moe_svd_distill.errors import BadDataError, UsageError, reason_of

_NAME = "default"
_MODEL = "base_model.model."
_VERIFY = "Verify the adapter, or write it again"

Scales: TypeAlias = float | Mapping[str, float]
"""One scale for the whole adapter, or one for each group of its weights."""

GROUPS = ("attention", "mlp", "experts", "head", "embeddings")

_PATTERNS = {
    "head": r"(^|\.)(lm_head|embed_out)(\.|$)|^output(\.|$)",
    "embeddings": r"(^|\.)(embed_tokens|word_embeddings|embed_in|embeddings|wte)(\.|$)",
    "attention": r"\.(self_attn|attn|attention|self_attention|linear_attn|mamba)(\.|$)",
    "mlp": r"\.shared_(experts?|mlp)(\.|$)",
    "experts": r"\.(experts|router|block_sparse_moe)(\.|$)|\.(mlp|feed_forward|ffn)\.gate(\.|$)",
}


def group_of(name: str) -> str:
    """Return the group of a module or tensor name; what belongs to no other is `mlp`."""
    return next((group for group, pattern in _PATTERNS.items() if re.search(pattern, name)), "mlp")


def by_group(scales: Scales, groups: Iterable[str]) -> dict[str, float]:
    """A scale for each of the groups.

    Raises:
        UsageError: A group has none.
    """
    wanted = sorted(set(groups))
    if not isinstance(scales, Mapping):
        return dict.fromkeys(wanted, float(scales))
    if missing := [group for group in wanted if group not in scales]:
        raise UsageError(f"No scale is given for {', '.join(missing)}", f"Give one for each of {', '.join(wanted)}")
    return {group: float(scales[group]) for group in wanted}


@dataclass(frozen=True)
class ScaledAdapter:
    """A LoRA adapter, and how far it is turned up.

    Attributes:
        folder: Folder with adapter_config.json and adapter_model.safetensors.
        scales: Factor on the whole adapter, or one for each group of its weights.
    """

    folder: Path
    scales: Scales = 1.0

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return any(self.scales.values()) if isinstance(self.scales, Mapping) else bool(self.scales)

    def scale_of(self, name: str) -> float:
        """Factor on a weight of this name; 1 where its group has none."""
        return float(self.scales.get(group_of(name), 1.0) if isinstance(self.scales, Mapping) else self.scales)


class AdapterOverlay:
    """The adapter's layers inside a skeleton; they hold values only for the parts that are attached."""

    def __init__(self, stored: CheckpointMap, adapter: ScaledAdapter) -> None:
        """Wrap the base model's skeleton in place; its slots and parts stay what they were.

        Raises:
            BadDataError: PEFT would not load every tensor, or something that is not known here.
            UsageError: A group of the adapter has no scale, or one that is not finite.
        """
        folder, skeleton = adapter.folder, stored.skeleton
        check_loads(folder, stored.checkpoint.config)
        self._skeleton, self._folder = skeleton, folder
        self._tensors = adapter_header(folder).tensors
        self._homes = _homes(skeleton)
        self._peft = _wrap(skeleton.model, folder)
        self._modules = self._adapted_modules()
        groups = {name: group_of(name) for entries in self._modules.values() for name, _ in entries}
        factors = by_group(adapter.scales, groups.values())
        self._factors = {name: factors[group] for name, group in groups.items()}
        if wrong := next((group for group, factor in factors.items() if not math.isfinite(factor)), None):
            raise UsageError(f"The scale of {wrong} is {factors[wrong]}, expected a finite number", "Give a number")
        self._scaling = {
            name: float(module.scaling[_NAME])
            for entries in self._modules.values()
            for name, module in entries
            if hasattr(module, "scaling")
        }
        self._keys = self._keys_of_parts()

    def read(self, part: Part) -> dict[str, Tensor]:
        """The adapter's tensors of a part, by key, in memory of their own."""
        return {key: read_tensor(self._tensors[key]).clone() for key in self._keys.get(part, ())}

    def load(self, part: Part, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Let PEFT load the tensors of a part, before the base weights are there.

        PEFT moves them to the device and the type of the base weight. A user who loads the whole model in bf16 has
        them in float32 nevertheless, so a stand-in of that type lies there meanwhile.

        Raises:
            BadDataError: PEFT does not take one of them.
        """
        if not self._modules.get(part):
            return
        from peft import set_peft_model_state_dict

        for slot in self._skeleton.of_part(part):
            wide = torch.promote_types(slot.dtype, torch.float32)
            slot.fill(torch.empty(0, dtype=wide, device=device))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # check_loads has settled what PEFT warns about
            result = set_peft_model_state_dict(
                self._peft, self._with_saved_modules(tensors, part), adapter_name=_NAME, low_cpu_mem_usage=True
            )
        if result.unexpected_keys:
            raise BadDataError(f"{self._folder}: PEFT drops {result.unexpected_keys[0]}", _VERIFY)

    def settle(self, part: Part, device: torch.device) -> None:
        """Turn the dial and merge what is merged, now that the base weights of a part are there.

        Raises:
            BadDataError: PEFT has left something empty.
        """
        for name, module in self._modules.get(part, ()):
            for own_name, parameter in module.named_parameters():
                if parameter.is_meta:
                    raise BadDataError(f"{self._folder}: nothing fills {own_name} of {name}", _VERIFY)
            self._scale(name, module, device)
        self._peft.eval().requires_grad_(False)

    def release(self, part: Part) -> None:
        """Let go of the adapter's tensors of a part."""
        for name, module in self._modules.get(part, ()):
            if name in self._scaling:
                module.scaling[_NAME] = self._scaling[name]
                module.merged_adapters.clear()
            for owner in module.modules():
                if _is_adapters_own(owner, module):
                    for attribute, parameter in owner._parameters.items():
                        if parameter is not None:
                            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                            owner._parameters[attribute] = nn.Parameter(empty, requires_grad=False)

    def merged_head(self) -> Any:
        """The output head, whose part is attached, with what the adapter adds to it in its weight."""
        entries = self._modules.get(HEAD, [])
        if not entries:
            return self._skeleton.head
        name, module = entries[-1]
        if name not in self._scaling:
            return module.modules_to_save[_NAME]
        if not module.merged_adapters:
            module.merge()
        return module.get_base_layer()

    def _scale(self, name: str, module: Any, device: torch.device) -> None:
        from peft.tuners.lora.layer import ParamWrapper

        factor = self._factors[name]
        if name in self._scaling:
            module.scaling[_NAME] = self._scaling[name] * factor
            module.merged_adapters.clear()
            if isinstance(module, ParamWrapper):
                module.merge()
            return
        pairs = zip(module.original_module.parameters(), module.modules_to_save[_NAME].parameters(), strict=True)
        for old, new in pairs:
            new.data = new.data.to(device, old.dtype)
            if factor != 1.0:
                new.data = old.data + factor * (new.data - old.data)

    def _with_saved_modules(self, tensors: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
        """PEFT asks for every module saved whole, whatever the part: give it what is there already."""
        result = dict(tensors)
        for other, entries in self._modules.items():
            for name, module in entries:
                if other != part and name not in self._scaling:
                    for short, long in module.adapter_state_dict_load_map(_NAME).items():
                        result[f"{_MODEL}{name}.{short}"] = module.get_parameter(long)
        return result

    def _adapted_modules(self) -> dict[Part, list[tuple[str, Any]]]:
        """Part to its adapted modules: innermost first, so that a wrapper around a wrapper comes after it."""
        from peft.tuners.lora import LoraLayer
        from peft.utils import ModulesToSaveWrapper
        from peft.utils.other import AuxiliaryTrainingWrapper

        found: dict[Part, list[tuple[str, Any]]] = defaultdict(list)
        for name, module in self._peft.base_model.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
                raise BadDataError(
                    f"{self._folder}: {name} is adapted by {type(module).__name__}, expected LoRA or whole modules",
                    "Merge the adapter into its base model",
                )
            if isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
                part = self._part_of(name)
                if part == OUTSIDE:
                    raise BadDataError(f"{self._folder}: it changes {name}, which is not in the decoder", _VERIFY)
                parameter = f".{module.parameter_name}" if hasattr(module, "parameter_name") else ""
                found[part].insert(0, (name + parameter, module))
        return found

    def _keys_of_parts(self) -> dict[Part, list[str]]:
        plain = {key: _plain_name(key) for key in self._tensors}
        renamed = {hub_name: name for hub_name, name, _, _ in in_memory(self._skeleton, set(plain.values()))}
        found: dict[Part, list[str]] = defaultdict(list)
        for key, name in plain.items():
            part = self._part_of(renamed[name])
            part = self._part_of(name) if part == OUTSIDE else part
            if part == OUTSIDE:
                raise BadDataError(f"{self._folder}: tensor {key} belongs to no part of the decoder", _VERIFY)
            found[part].append(key)
        return found

    def _part_of(self, name: str) -> Part:
        """The part of a module or parameter, by the closest module above it that was there before PEFT came."""
        path = name.replace(".base_layer", "")
        while path:
            if path in self._homes:
                return self._homes[path]
            path = path.rpartition(".")[0]
        return OUTSIDE


def _homes(skeleton: Skeleton) -> dict[str, Part]:
    """Name of a module or parameter to its part; names that hold several parts are left out."""
    found: dict[str, Part | None] = {}
    for name, slot in skeleton.slots.items():
        path = name
        while path:
            found[path] = slot.part if found.get(path, slot.part) == slot.part else None
            path = path.rpartition(".")[0]
    return {name: part for name, part in found.items() if part is not None}


def _wrap(model: Any, folder: Path) -> Any:
    from peft import PeftConfig, PeftModel

    configuration = PeftConfig.from_pretrained(str(folder))
    if configuration.bias != "none":
        raise BadDataError(
            f"{folder}: bias is {configuration.bias!r}, expected 'none'", "Merge the adapter into its base model"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel(model, configuration, adapter_name=_NAME, low_cpu_mem_usage=True)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        reason = reason_of(error)
        raise BadDataError(f"PEFT cannot load the adapter in {folder} ({reason})", _VERIFY) from error
    return wrapped.eval().requires_grad_(False)


def _plain_name(key: str) -> str:
    """The weight that an adapter's tensor changes, as the adapter names it."""
    name = re.sub(r"\.lora_(embedding_)?[A-Za-z]+(_vector)?(\.weight|\.bias)?$", "", key.removeprefix(_MODEL))
    name = name.replace(".base_layer", "")
    return name if name.endswith((".weight", ".bias")) else f"{name}.weight"


def _is_adapters_own(owner: nn.Module, module: Any) -> bool:
    """Whether a module inside an adapted one holds the adapter's values, not the base model's."""
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return any(owner is inner for inner in module.modules_to_save.modules())
    containers = [getattr(module, name, None) for name in (*module.adapter_layer_names, *module.other_param_names)]
    own = [container for container in containers if isinstance(container, nn.Module)]
    return any(owner is inner for container in own for inner in container.modules())
