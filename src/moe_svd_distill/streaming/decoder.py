"""A model's decoder from its checkpoint: any of its layers in memory, and batches through them.

A pass, the last layers alone and training run the same modules on the same weights; what differs is which layers are
there at a time, and whether gradients are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moe_svd_distill.architecture.matrices import LayerMatrices, find_matrices
from moe_svd_distill.architecture.skeleton import EMBEDDING, ENDS, build_skeleton
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.execution.memory import give_back
from moe_svd_distill.streaming.gates import GatedDecoder, replicate
from moe_svd_distill.streaming.layout import GateLayout
from moe_svd_distill.streaming.overlay import AdapterOverlay, ScaledAdapter
from moe_svd_distill.streaming.states_file import LayerInputs
from moe_svd_distill.streaming.tables import EmbeddingChange, stored_tables
from moe_svd_distill.streaming.weights import WeightReader


class Decoder:
    """A decoder whose layers come and go. Embedding tables stay in their files.

    Attributes:
        skeleton: Its modules; in an adapter's layers if there is one.
        stored: Where their values lie in the checkpoint.
        layers: Number of its layers.
        reader: Reads a layer while another one computes.
        watch: The largest memory seen while weights were read.
        replicas: What runs, one for each worker.
        layout: What passes from layer to layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        devices: Sequence[torch.device],
        dtype: torch.dtype = torch.float32,
        *,
        gradients: bool = False,
        adapter: ScaledAdapter | None = None,
        embedding_change: EmbeddingChange | None = None,
    ) -> None:
        """Read what lies around the layers.

        Args:
            checkpoint: The model.
            devices: One for each worker; one of them may be named more than once.
            dtype: Type to compute in.
            gradients: Whether gradients by the layers' weights will be asked for.
            adapter: Applied as PEFT does.
            embedding_change: What is added to the token embeddings.

        Raises:
            BadDataError: A tensor is missing, or has a wrong shape or no place.
            IncompatiblePairError: The model has no list of decoder layers.
        """
        self.device = devices[0]
        kind = self.device.type
        self.skeleton = build_skeleton(checkpoint.config, checkpoint.title, dtype, kind, gradients=gradients)
        self.stored = CheckpointMap(checkpoint, self.skeleton)
        self.layers = len(self.skeleton.originals)
        overlay = None if adapter is None else AdapterOverlay(self.stored, adapter)
        self._tables = stored_tables(self.stored, self.device, embedding_change)
        self.reader = WeightReader(self.stored, self.device, overlay, self._tables)
        self.watch = self.reader.watch
        self._here: set[int] = set()
        for part in (EMBEDDING, ENDS):
            self.reader.attach(part)
        if embedding_change is not None and not any(slot.part == EMBEDDING for slot in self._tables):
            weight: Any = self.skeleton.embedding.weight
            with torch.no_grad():
                weight.add_(embedding_change(torch.arange(len(weight))).to(weight))
        self.replicas = [GatedDecoder(self.skeleton, device) for device in devices]
        self.layout = GateLayout(type(self.skeleton.decoder).__name__, self.layers)

    @cached_property
    def matrices(self) -> LayerMatrices:
        """What an adapter can change in the layers, and what it cannot."""
        return find_matrices(self.skeleton, self.stored)

    @property
    def bytes_read(self) -> int:
        """Stored bytes of weights read so far; each row of an embedding table counts once."""
        return self.reader.bytes_read + sum(table.rows.bytes_read for table in self._tables.values())

    @property
    def bytes_needed(self) -> int:
        """Stored bytes of everything that the decoder needs; of embedding tables the rows that were looked up."""
        spared = sum(table.rows.bytes - table.rows.bytes_read for table in self._tables.values())
        return self.stored.decoder_bytes() - spared

    def enter(self, layer: int, following: int | None = None) -> None:
        """See to it that a layer's weights are in memory.

        Args:
            layer: Its number.
            following: The layer wanted next, which is read meanwhile.
        """
        if layer not in self._here:
            self._attach(layer)
            self._place(layer)
        if following is not None and following not in self._here:
            self.reader.prefetch(following)

    def enter_all(self, begin: int = 0) -> None:
        """Have all layers from one on in memory, for good."""
        for layer in range(begin, self.layers):
            self._attach(layer)
        for layer in range(begin, self.layers):  # not before all are there: some share modules
            self._place(layer)

    def knows_inputs(self, inputs: LayerInputs) -> None:
        """Learn from what a pass has recorded at a layer how to go on from there."""
        self.layout.decode(inputs.layer, inputs.layout)

    def leave(self, layer: int) -> None:
        """Let go of a layer's weights."""
        for replica in self.replicas:
            replica.layers.pop(layer, None)
        self.reader.release(layer)
        self._here.discard(layer)
        give_back()

    def step(self, layer: int, ids: Tensor, recorded: Sequence[Tensor]) -> list[Tensor]:
        """One layer that is not the last, with gradients where they are enabled.

        Args:
            layer: Its number; it is in memory.
            ids: Token ids (rows, length).
            recorded: What was recorded at it for these sequences, (rows, …); nothing at the first layer.

        Returns:
            What is recorded at the next layer.

        Raises:
            IncompatiblePairError: The architecture cannot be run layer by layer.
        """
        return self.layout.step(self.replicas[0], ids, layer, recorded)

    def states(self, ids: Tensor, begin: int = 0, recorded: Sequence[Tensor] = ()) -> Tensor:
        """Final hidden states (rows, length, d) from a layer on, with gradients where they are enabled.

        Args:
            ids: Token ids (rows, length).
            begin: The layer to begin at; it is in memory, and all behind it are.
            recorded: What was recorded at it for these sequences, (rows, …); nothing at the first layer.
        """
        return self.layout.states(self.replicas[0], ids, begin, recorded)

    def close(self) -> None:
        """Let go of everything."""
        self.reader.close()
        for layer in tuple(self._here):
            self.leave(layer)
        for part in (EMBEDDING, ENDS):
            self.skeleton.clear(part)
        self.replicas.clear()
        give_back()

    def _attach(self, layer: int) -> None:
        self.reader.attach(layer)
        self._here.add(layer)

    def _place(self, layer: int) -> None:
        module: nn.Module = self.skeleton.originals[layer]
        for replica in self.replicas:
            module = replica.layers[layer] = replicate(module, replica.device)
