"""A student with an adapter around its layers, and a dial for how much of the adapter acts.

Two ways to turn the dial. *Live* multiplies the factor that PEFT itself puts before B·A: exactly what a reader of the
adapter gets, but the fused experts are rebuilt in every forward pass. *Merged* writes W + s·BA into the weights once,
always from an untouched copy of W, and costs nothing per pass: the way for many passes at many scales.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moe_svd_distill.adapter.load_check import check_loads
from moe_svd_distill.errors import BadDataError, UsageError

Scales: TypeAlias = float | Mapping[str, float]
"""One scale for the whole adapter, or one for each group."""

GROUPS = ("attention", "mlp", "experts", "head", "embeddings")

_NAME = "default"
_PATTERNS = {
    "head": r"(^|\.)(lm_head|embed_out)(\.|$)|^output(\.|$)",
    "embeddings": r"(^|\.)(embed_tokens|word_embeddings|wte)(\.|$)",
    "attention": r"\.(self_attn|attn|attention|self_attention|linear_attn)(\.|$)",
    "mlp": r"\.shared_(experts?|mlp)(\.|$)",
    "experts": r"\.(experts|router|block_sparse_moe)(\.|$)|\.(mlp|feed_forward|ffn)\.gate(\.|$)",
}


def group_of(name: str) -> str:
    """Return the group of a module or tensor name; what belongs to no other is `mlp`."""
    return next((group for group, pattern in _PATTERNS.items() if re.search(pattern, name)), "mlp")


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
            reason = str(error).strip().split("\n", 1)[0]
            raise BadDataError(f"PEFT cannot load the adapter in {adapter_folder} ({reason})", "Verify it") from error
        return cls(loaded.eval().requires_grad_(False))

    def set_live(self, scales: Scales = 1.0) -> None:
        """Let the adapter act as PEFT loads it, times `scales`."""
        by_group = self._by_group(scales)
        self._restore()
        self._peft.base_model.enable_adapter_layers()
        for part in self._parts:
            part.set_live(by_group[part.group])

    def set_merged(self, scales: Scales) -> None:
        """Write W + scale·BA into the weights, and leave PEFT's own layers aside."""
        by_group = self._by_group(scales)
        self._peft.base_model.disable_adapter_layers()
        for part in self._parts:
            part.set_merged(by_group[part.group])

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
        if hasattr(student, "peft_config"):  # what makes PEFT take the next adapter for a second one
            del student.peft_config
        return student

    def _restore(self) -> None:
        for part in self._parts:
            part.restore()

    def _by_group(self, scales: Scales) -> dict[str, float]:
        if not isinstance(scales, Mapping):
            return dict.fromkeys(self.groups, float(scales))
        missing = [group for group in self.groups if group not in scales]
        if missing:
            raise UsageError(
                f"No scale is given for {', '.join(missing)}", f"Give one for each of {', '.join(self.groups)}"
            )
        return {group: float(scales[group]) for group in self.groups}


class _LowRankPart:
    """One adapted weight: a layer, an embedding, or a parameter that holds all experts."""

    def __init__(self, name: str, layer: Any) -> None:
        parameter_name = getattr(layer, "parameter_name", "weight")
        self.group = group_of(f"{name}.{parameter_name}")
        self.layer = layer
        self.weight: Tensor = getattr(layer.get_base_layer(), parameter_name)
        self.factor = float(layer.scaling[_NAME])
        self.pristine: Tensor | None = None

    def set_live(self, scale: float) -> None:
        self.layer.scaling[_NAME] = self.factor * scale

    def set_merged(self, scale: float) -> None:
        if self.pristine is None:
            self.pristine = self.weight.detach().clone()
        self.weight.data.copy_(self.pristine)
        if scale != 0.0:
            self.layer.scaling[_NAME] = self.factor
            self.weight.data.add_(self.layer.get_delta_weight(_NAME), alpha=scale)

    def restore(self) -> None:
        if self.pristine is not None:
            self.weight.data.copy_(self.pristine)
        self.layer.scaling[_NAME] = self.factor


class _ReplacedPart:
    """A module that the adapter replaces whole (`modules_to_save`); in between lies the straight line of weights."""

    def __init__(self, name: str, wrapper: Any) -> None:
        self.group = group_of(name)
        self.pairs: Sequence[tuple[Tensor, Tensor]] = list(
            zip(wrapper.original_module.parameters(), wrapper.modules_to_save[_NAME].parameters(), strict=True)
        )
        self.pristine = [(old.detach().clone(), new.detach().clone()) for old, new in self.pairs]

    def set_live(self, scale: float) -> None:
        self._blend(scale, 1)

    def set_merged(self, scale: float) -> None:
        self._blend(scale, 0)

    def restore(self) -> None:
        for pair, values in zip(self.pairs, self.pristine, strict=True):
            for tensor, value in zip(pair, values, strict=True):
                tensor.data.copy_(value)

    def _blend(self, scale: float, side: int) -> None:
        for pair, (old, new) in zip(self.pairs, self.pristine, strict=True):
            pair[side].data.copy_(new if scale == 1.0 else old + scale * (new - old))


def _parts(model: Any) -> Sequence[_LowRankPart | _ReplacedPart]:
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    parts: list[_LowRankPart | _ReplacedPart] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parts.append(_LowRankPart(name, module))
        elif isinstance(module, ModulesToSaveWrapper):
            parts.append(_ReplacedPart(name, module))
    return parts
