"""A working copy of a layer whose weights lie on a device."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn


def replicate(layer: nn.Module, device: torch.device) -> nn.Module:
    """Copy the structure of a layer, and its tensors only where they are not on the device yet.

    PEFT and visitors change modules while they run; every device gets modules of its own for that reason.
    """
    known: dict[int, object] = {}
    for tensor in chain(layer.parameters(), layer.buffers()):
        if tensor.device == device:
            known[id(tensor)] = tensor
        elif isinstance(tensor, nn.Parameter):
            known[id(tensor)] = nn.Parameter(tensor.detach().to(device), requires_grad=tensor.requires_grad)
        else:
            known[id(tensor)] = tensor.to(device)
    for module in layer.modules():
        configuration = getattr(module, "config", None)
        if configuration is not None:
            known[id(configuration)] = configuration
    return copy.deepcopy(layer, known)
