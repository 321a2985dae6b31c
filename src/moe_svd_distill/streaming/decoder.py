"""A decoder to be trained layer by layer: all of it in memory, or one layer and the next at a time.

Both compute with the same modules on the same weights; what differs is only when a layer's weights are there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_svd_distill.architecture.matrices import Matrix, find_matrices
from moe_svd_distill.architecture.skeleton import EMBEDDING, ENDS, Skeleton, build_skeleton
from moe_svd_distill.architecture.stored import CheckpointMap
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.memory import MemoryWatch, give_back
from moe_svd_distill.streaming.decoder_run import DecoderRun, LayerCall
from moe_svd_distill.streaming.weights import Prefetcher, Weights

EmbeddingChange = Callable[[Tensor], Tensor]
"""Token ids (n,) to what is added to their embeddings as stored, (n, d)."""


class Decoder(Protocol):
    """A decoder whose layers come and go.

    Attributes:
        layers: Their number.
        device: Where it computes.
        weights: Layer to its stored matrices that can be changed where they lie.
        fixed: Stored matrices of the layers that an operation of transformers takes apart.
        resident: Whether every layer is in memory all the time.
        watch: The largest memory seen while weights were read.
    """

    layers: int
    device: torch.device
    weights: Mapping[int, tuple[Matrix, ...]]
    fixed: list[str]
    resident: bool
    watch: MemoryWatch

    @property
    def bytes_read(self) -> int:
        """Stored bytes of weights read so far."""

    @property
    def seconds_reading(self) -> float:
        """Time in which a layer was being read, beside other work or not."""

    @property
    def seconds_waiting(self) -> float:
        """Time without work because a layer was not there yet."""

    def enter(self, layer: int, following: int | None = None) -> None:
        """See to it that a layer's weights are in memory.

        Args:
            layer: Its number.
            following: The layer wanted next, which may be read meanwhile.
        """

    def leave(self, layer: int) -> None:
        """A layer's weights are not needed for now."""

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (rows, length) to what the first layer gets, (rows, length, d)."""

    def run(self, layer: int, states: Tensor) -> Tensor:
        """One layer on (rows, length, d), with gradients where they are enabled."""

    def finish(self, states: Tensor) -> Tensor:
        """What the last layer returned, (rows, length, d), to the final hidden states."""

    def close(self) -> None:
        """Let go of everything."""


class _Base(ABC):
    """What both kinds share."""

    resident = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        length: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        embedding_change: EmbeddingChange | None = None,
    ) -> None:
        """Read the end of the decoder, and all of it where it stays in memory.

        Args:
            checkpoint: The model.
            length: Tokens of a sequence.
            device: Where to.
            dtype: Type to compute in.
            embedding_change: What an adapter adds to the embeddings.

        Raises:
            BadDataError: A tensor is missing.
            IncompatiblePairError: The architecture cannot be run layer by layer.
        """
        skeleton = build_skeleton(checkpoint.config, checkpoint.source, dtype, device.type, gradients=True)
        self.device, self._skeleton, self._checkpoint = device, skeleton, checkpoint
        self._embedding_change = embedding_change
        self._sources = CheckpointMap(checkpoint, skeleton)
        self.watch = MemoryWatch()
        self._bytes_of_rows = 0
        self._weights = Weights(checkpoint, skeleton, self._sources, None, device, self.watch.look)
        self.layers = len(skeleton.originals)
        self._calls: dict[int, list[LayerCall]] = {}
        matrices = find_matrices(skeleton, self._sources)
        self.weights: Mapping[int, tuple[Matrix, ...]] = matrices.of_layer
        self.fixed = list(matrices.left_out)
        self._weights.attach(ENDS, self._weights.read(ENDS))
        for module in skeleton.decoder.modules():
            for name in module._non_persistent_buffers_set:
                if module._buffers.get(name) is not None:
                    module._buffers[name] = module._buffers[name].to(device)
        self._run = DecoderRun(skeleton, device, length)
        self._begin()

    @abstractmethod
    def _begin(self) -> None:
        """Read what is to be there from the beginning."""

    @property
    def bytes_read(self) -> int:
        """Stored bytes of weights read so far."""
        return self._weights.bytes_read + self._bytes_of_rows

    def run(self, layer: int, states: Tensor) -> Tensor:
        """As `Decoder`."""
        count = len(states)
        if count not in self._calls:
            self._calls[count] = self._run.calls(count)
        return self._calls[count][layer](self._skeleton.originals[layer], states)

    def finish(self, states: Tensor) -> Tensor:
        """As `Decoder`."""
        return self._run.finish(states)


class ResidentDecoder(_Base):
    """A `Decoder` that is in memory."""

    seconds_reading = seconds_waiting = 0.0

    def _begin(self) -> None:
        for part in (EMBEDDING, *range(self.layers)):
            self._weights.attach(part, self._weights.read(part))
        if self._embedding_change is not None:
            weight: Any = self._skeleton.embedding.weight
            with torch.no_grad():
                weight.add_(self._embedding_change(torch.arange(len(weight))).to(weight))

    def enter(self, layer: int, following: int | None = None) -> None:
        """As `Decoder`: it is there."""

    def leave(self, layer: int) -> None:
        """As `Decoder`: it stays."""

    def embed(self, ids: Tensor) -> Tensor:
        """As `Decoder`."""
        return self._run.embed(ids)

    def close(self) -> None:
        """As `Decoder`."""
        for part in (EMBEDDING, ENDS, *range(self.layers)):
            self._skeleton.clear(part)
        give_back()


class StreamedDecoder(_Base):
    """A `Decoder` of which one layer is in memory, and the one that is wanted next."""

    resident = False

    def _begin(self) -> None:
        self._reader = Prefetcher(self._weights, self.device)
        self._here: int | None = None
        self._coming: int | None = None
        self._embedding_name = _embedding_name(self._sources, self._skeleton)
        embedding: Any = self._skeleton.embedding
        embedding.padding_idx = None  # only its gradient would mind; the table in memory is shorter than it

    def enter(self, layer: int, following: int | None = None) -> None:
        """As `Decoder`."""
        if self._here != layer:
            if self._here is not None:
                self._weights.release(self._here)
                give_back()
            if self._coming is not None and self._coming != layer:
                self._reader.take(self._coming)
            self._here, self._coming = None, None
            self._weights.attach(layer, self._reader.take(layer))
            self._here = layer
        if following is not None and following != layer and self._coming is None:
            self._coming = following
            self._reader.start(following)

    def leave(self, layer: int) -> None:
        """As `Decoder`: its weights may have been changed, so they are read anew the next time."""
        if self._here == layer:
            self._weights.release(layer)
            self._here = None
            give_back()

    def embed(self, ids: Tensor) -> Tensor:
        """As `Decoder`; of the embeddings only the rows of these tokens are read."""
        present, places = torch.unique(ids, return_inverse=True)
        table = self._checkpoint.read(self._embedding_name)[present.cpu()].to(self.device, self._skeleton.dtype)
        self._bytes_of_rows += len(table) * self._checkpoint[self._embedding_name].bytes // self._skeleton.vocabulary
        if self._embedding_change is not None:
            table = table + self._embedding_change(present).to(table)
        embedding: Any = self._skeleton.embedding
        before = embedding.weight
        embedding.weight = nn.Parameter(table, requires_grad=False)
        try:
            return self._run.embed(places)
        finally:
            embedding.weight = before

    @property
    def seconds_waiting(self) -> float:
        """As `Decoder`."""
        return self._reader.seconds_waiting

    @property
    def seconds_reading(self) -> float:
        """As `Decoder`."""
        return self._reader.seconds_reading

    def close(self) -> None:
        """As `Decoder`."""
        self._reader.__exit__(None, None, None)
        if self._here is not None:
            self._weights.release(self._here)
        self._skeleton.clear(ENDS)
        self._here = None
        give_back()


def _embedding_name(sources: CheckpointMap, skeleton: Skeleton) -> str:
    for origin in sources.of_part[EMBEDDING]:
        if len(origin.pieces) == 1 and origin.slots[0].attribute == "weight":
            return origin.pieces[0].hub_name
    raise BadDataError(
        f"The embeddings of {type(skeleton.model).__name__} are not stored as one tensor", "Train it in memory"
    )
