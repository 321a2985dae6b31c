"""A working copy of modules whose weights lie on a device."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn

from moe_svd_distill.streaming.tables import StoredTable


def replicate(module: nn.Module, device: torch.device, known: dict[int, object] | None = None) -> nn.Module:
    """Copy the structure of a module, and its tensors only where they are not on the device yet.

    PEFT, visitors and some architectures change modules while they run; every device gets modules of its own for that
    reason.

    Args:
        module: It may be without memory in parts.
        device: Where the copy computes.
        known: Identity of a module inside to what takes its place.
    """
    memo = dict(known or {})
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.device == device or tensor.is_meta:
            memo[id(tensor)] = tensor
        elif isinstance(tensor, StoredTable):
            memo[id(tensor)] = tensor.on(device)
        elif isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(tensor.detach().to(device), requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = tensor.to(device)
    for inner in module.modules():
        configuration = getattr(inner, "config", None)
        if configuration is not None:
            memo[id(configuration)] = configuration
    return copy.deepcopy(module, memo)
