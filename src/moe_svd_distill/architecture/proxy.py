"""A module in the place of another."""

from __future__ import annotations

from typing import Any

from torch import nn


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
