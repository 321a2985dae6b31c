"""Adapters at other scales, by the factor that PEFT itself puts before B·A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import LoraLayer

from moe_svd_distill.streaming import group_of


def groups_of(model: Any) -> tuple[str, ...]:
    """The groups that the adapter of a model has anything in."""
    return tuple(sorted({group for group, _ in _layers(model)}))


def scaled(model: Any, scales: Mapping[str, float]) -> Any:
    """The same model with each group of its adapter multiplied by its scale."""
    for group, layer in _layers(model):
        layer.scaling["default"] *= scales[group]
    return model


def _layers(model: Any) -> list[tuple[str, LoraLayer]]:
    return [
        (group_of(f"{name}.{getattr(layer, 'parameter_name', 'weight')}"), layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    ]
