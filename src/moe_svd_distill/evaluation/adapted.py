"""A student with an adapter around its layers, and a dial for how much of the adapter acts.

Two ways to turn the dial. *Live* multiplies the factor that PEFT itself puts before B·A: exactly what a reader of the
adapter gets, but the fused experts are rebuilt in every forward pass. *Merged* writes W + s·BA into the weights once,
always from an untouched copy of W, and costs nothing per pass: the way for many passes at many scales.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.errors import BadDataError, reason_of
from moe_svd_distill.streaming import GROUPS, Scales, by_group, group_of

_NAME = "default"


class AdaptedStudent:
    """A student model with its adapter loaded by PEFT; `model` is what to measure.

    Attributes:
        model: The causal language model with adapted layers inside.
        groups: The groups of `GROUPS` the adapter has anything in.
    """

    def __init__(self, peft_model: Any) -> None:
        self._peft = peft_model
        self.model = peft_model.get_base_model()
        self._parts = list(_parts(self.model))
        present = {part.group for part in self._parts}
        self.groups = tuple(group for group in GROUPS if group in present)

    @classmethod
    def load(cls, student: Any, adapter_folder: str | Path) -> AdaptedStudent:
        """Wrap a loaded student's layers, in place, and refuse an adapter that PEFT would half ignore.

        Args:
            student: A transformers causal language model.
            adapter_folder: Folder with adapter_config.json and adapter_model.safetensors.
        """
        from peft import PeftModel

        check_loads(adapter_folder, student.config.to_dict())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # check_loads has settled what PEFT warns about
                loaded = PeftModel.from_pretrained(student, str(adapter_folder), adapter_name=_NAME)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = reason_of(error)
            raise BadDataError(f"PEFT cannot load the adapter in {adapter_folder} ({reason})", "Verify it") from error
        return cls(loaded.eval().requires_grad_(False))

    def set_live(self, scales: Scales = 1.0) -> None:
        """Let the adapter act as PEFT loads it, times `scales`."""
        factors = by_group(scales, self.groups)
        self._restore()
        self._peft.base_model.enable_adapter_layers()
        for part in self._parts:
            part.set_live(factors[part.group])

    def set_merged(self, scales: Scales) -> None:
        """Write W + scale·BA into the weights, and leave PEFT's own layers aside.

        What cannot be merged without changing something else stays live: a module that is replaced whole, and a weight
        that another module holds as well, as a head that is tied to the embeddings.
        """
        factors = by_group(scales, self.groups)
        self._restore()
        self._peft.base_model.disable_adapter_layers()
        for part in self._parts:
            part.set_merged(factors[part.group])

    def set_scale(self, scales: Scales) -> None:
        """Turn the dial in the faster exact way: merged in float32, live where rounding would swallow the delta."""
        if self.model.dtype == torch.float32:
            self.set_merged(scales)
        else:
            self.set_live(scales)

    def detach(self) -> Any:
        """Return the untouched student without any adapter; this object must not be used afterwards."""
        self._restore()
        self._peft.base_model.enable_adapter_layers()
        student = self._peft.unload()
        for part in self._parts:
            if isinstance(part, _ReplacedPart):  # PEFT leaves the replacement behind
                student.set_submodule(part.name, part.wrapper.original_module)
        if hasattr(student, "peft_config"):  # what makes PEFT take the next adapter for a second one
            del student.peft_config
        return student

    def _restore(self) -> None:
        for part in self._parts:
            part.restore()


class _LowRankPart:
    """One adapted weight: a layer, an embedding, or a parameter that holds all experts; maybe another module's too."""

    def __init__(self, name: str, layer: Any, shared: bool) -> None:
        self.group = group_of(f"{name}.{_parameter_of(layer)}")
        self.layer, self.shared = layer, shared
        self.weight: Tensor = getattr(layer.get_base_layer(), _parameter_of(layer))
        self.factor = float(layer.scaling[_NAME])
        self.pristine: Tensor | None = None

    def set_live(self, scale: float) -> None:
        self.layer.scaling[_NAME] = self.factor * scale

    def set_merged(self, scale: float) -> None:
        if self.shared:
            _switch_on(self.layer)
            self.set_live(scale)
            return
        if self.pristine is None:
            self.pristine = self.weight.detach().clone()
        if scale != 0.0:
            self.weight.data.add_(self.layer.get_delta_weight(_NAME), alpha=scale)

    def restore(self) -> None:
        if self.pristine is not None:
            self.weight.data.copy_(self.pristine)
        self.layer.scaling[_NAME] = self.factor


class _ReplacedPart:
    """A module that the adapter replaces whole (`modules_to_save`); in between lies the straight line of weights.

    Only the replacement is ever written: the original may be tied to the embeddings.
    """

    def __init__(self, name: str, wrapper: Any) -> None:
        self.group, self.name, self.wrapper = group_of(name), name, wrapper
        self.pairs: Sequence[tuple[Tensor, Tensor]] = list(
            zip(wrapper.original_module.parameters(), wrapper.modules_to_save[_NAME].parameters(), strict=True)
        )
        self.pristine = [new.detach().clone() for _, new in self.pairs]

    def set_live(self, scale: float) -> None:
        for (old, current), new in zip(self.pairs, self.pristine, strict=True):
            if scale != 1.0:
                current.data.copy_(old if scale == 0.0 else old + scale * (new - old))

    def set_merged(self, scale: float) -> None:
        _switch_on(self.wrapper)
        self.set_live(scale)

    def restore(self) -> None:
        for (_, current), new in zip(self.pairs, self.pristine, strict=True):
            current.data.copy_(new)


def _parameter_of(layer: Any) -> str:
    """Name of the weight that a layer of PEFT adapts."""
    return str(getattr(layer, "parameter_name", "weight"))


def _switch_on(layer: Any) -> None:
    """Let one layer of PEFT act while the others are switched off."""
    layer.enable_adapters(True)
    layer.requires_grad_(False)


def _parts(model: Any) -> Sequence[_LowRankPart | _ReplacedPart]:
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    parts: list[_LowRankPart | _ReplacedPart] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = getattr(module.get_base_layer(), _parameter_of(module))
            parts.append(_LowRankPart(name, module, holders[id(weight)] > 1))
        elif isinstance(module, ModulesToSaveWrapper):
            parts.append(_ReplacedPart(name, module))
    return parts
