"""What a visitor of a pass sees: one layer in memory, and everything that is about to go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_svd_distill.streaming.decoder_run import LayerCall


@dataclass(frozen=True, eq=False)
class LayerBatch:
    """A batch of sequences on its way through a layer.

    Attributes:
        rows: Which sequences of the pass.
        hidden: The layer's input (rows, length, d), a copy of its own on the layer's device.
        call: All else the layer is given; ``call(module, hidden)`` runs a layer on it.
    """

    rows: slice
    hidden: Tensor
    call: LayerCall


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
        inputs: Makes the iterator of `batches`.
    """

    index: int
    layers: int
    name: str
    layer: nn.Module
    device: torch.device
    inputs: Callable[[], Iterator[LayerBatch]]

    def batches(self) -> Iterator[LayerBatch]:
        """The inputs of the layer, batch by batch, in the order of the sequences; as often as needed."""
        return self.inputs()


Visit = Callable[[LayerVisit], None]
