"""What a visitor of a pass sees: one layer in memory, and everything that is about to go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from moe_svd_distill.streaming.gates import Call


@dataclass(frozen=True, eq=False)
class LayerVisit:
    """A layer while its weights are in memory, before its own forward pass.

    What the visitor changes in the layer's weights takes effect in that pass, and nowhere else.

    Attributes:
        index: The layer's number.
        layers: How many there are.
        name: Its name in the model, such as ``model.layers.3``.
        layer: The module, with the adapter's layers inside if the pass has one.
        device: Where it lies.
        batches: Makes an iterator of sequences and what the layer is given for them: ``layer(*arguments, **keywords)``
            runs it. In the order of the sequences, as often as needed, and each time tensors of their own.
    """

    index: int
    layers: int
    name: str
    layer: nn.Module
    device: torch.device
    batches: Callable[[], Iterator[tuple[slice, Call]]]


Visit = Callable[[LayerVisit], None]
