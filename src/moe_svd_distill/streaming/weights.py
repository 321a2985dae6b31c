"""Reading a part's weights into memory, each stored byte once, in a thread of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_svd_distill.architecture.skeleton import ParameterSlot, Part, Skeleton
from moe_svd_distill.architecture.stored import CheckpointMap, TensorSource
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.streaming.overlay import AdapterOverlay
from moe_svd_distill.streaming.staging import Staging
from moe_svd_distill.streaming.tables import StoredTable


@dataclass
class Loaded:
    """The tensors of one part in memory: of the base model by slot, of the adapter by key."""

    base: list[tuple[ParameterSlot, Tensor]] = field(default_factory=list)
    adapter: dict[str, Tensor] = field(default_factory=dict)


class Weights:
    """Reads parts, puts them into the skeleton and takes them out again.

    Attributes:
        bytes_read: Stored bytes of the base model read so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        skeleton: Skeleton,
        sources: CheckpointMap,
        overlay: AdapterOverlay | None,
        device: torch.device,
        look: Callable[[], object] = lambda: None,
        tables: Mapping[ParameterSlot, StoredTable] | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            checkpoint: The model.
            skeleton: What is filled.
            sources: Where the values lie.
            overlay: An adapter around the skeleton.
            device: Where to.
            look: Called whenever more memory has been taken.
            tables: Embeddings that stay in their files.
        """
        self._checkpoint, self._skeleton, self._sources = checkpoint, skeleton, sources
        self._overlay, self._device, self._look = overlay, device, look
        self._tables = tables or {}
        self._staging = Staging() if device.type == "cuda" else None
        self.bytes_read = 0

    def read(self, part: Part) -> Loaded:
        """Read a part into memory of its own on the device, converted to the type it is held in.

        Raises:
            BadDataError: A file was cut off or changed.
        """
        loaded = Loaded()
        with torch.no_grad():
            for origin in self._sources.of_part[part]:
                if (table := self._tables.get(origin.slots[0])) is not None:
                    loaded.base.append((origin.slots[0], table))
                    continue
                loaded.base += self._copied(origin) if origin.pieces else self._converted(origin)
            if self._overlay is not None:
                loaded.adapter = self._overlay.read(part)
        return loaded

    def attach(self, part: Part, loaded: Loaded) -> None:
        """Put what was read into the skeleton, with the adapter around it as PEFT puts it."""
        if self._overlay is not None:
            self._overlay.load(part, loaded.adapter, self._device)
            loaded.adapter.clear()
        while loaded.base:
            slot, tensor = loaded.base.pop()
            slot.fill(tensor)
        if self._overlay is not None:
            self._overlay.settle(part, self._device)
        self._look()

    def release(self, part: Part) -> None:
        """Let go of a part, once nothing on its way to the device needs it any more.

        The memory goes back to the stream that layers are read on, which would fill it again at once, while kernels
        that were started on another stream may still be waiting to read from it.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        if self._overlay is not None:
            self._overlay.release(part)
        self._skeleton.clear(part)

    def _copied(self, origin: TensorSource) -> list[tuple[ParameterSlot, Tensor]]:
        """Copy stored tensors straight to where they belong: no second copy exists at any time."""
        slot = origin.slots[0]
        whole = torch.empty(slot.shape, dtype=slot.dtype, device=self._device)
        for piece in origin.pieces:
            stored = self._fetch(piece.hub_name)
            region = piece.within(whole)
            if region.shape != stored.shape:
                found, expected = ("×".join(map(str, shape)) for shape in (stored.shape, region.shape))
                raise BadDataError(f"{piece.hub_name} is {found}, expected {expected}", "Fetch the model again")
            if self._staging is None or stored.device.type != "cpu":
                region.copy_(stored)
            else:
                self._staging.copy(region, stored)
            self._look()
        return [(slot, whole)]

    def _converted(self, origin: TensorSource) -> list[tuple[ParameterSlot, Tensor]]:
        kind = origin.slots[0].dtype
        stored = (self._fetch(name).to(self._device, kind, copy=True) for _, name in origin.hub_names)
        made = origin.convert(stored, self._sources.names)
        self._look()
        # A converter may return views of one tensor, or a stored one that is not contiguous.
        return [(slot, made[slot.name].to(slot.dtype).contiguous()) for slot in origin.slots]

    def _fetch(self, hub_name: str) -> Tensor:
        # What is quantised is dequantised where it is needed; anything else is copied from the file to its slot.
        device = "cpu" if self._checkpoint.quantisation is None else self._device
        tensor = self._checkpoint.read(hub_name, device=device)
        self.bytes_read += self._checkpoint[hub_name].bytes
        return tensor


class Prefetcher:
    """One thread that reads the next part while the devices compute.

    Attributes:
        seconds_reading: The thread at work.
        seconds_waiting: The caller waiting for it.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._weights, self._device = weights, device
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._coming: tuple[Part, Future[Loaded]] | None = None
        self._stream: torch.cuda.Stream | None = None
        self.seconds_reading = self.seconds_waiting = 0.0

    @property
    def coming(self) -> Part | None:
        """The part that is being read, until it is taken."""
        return None if self._coming is None else self._coming[0]

    def start(self, part: Part) -> None:
        """Begin to read a part; it is taken before the next one is started."""
        assert self._coming is None
        self._coming = (part, self._pool.submit(self._read, part))

    def take(self, part: Part) -> Loaded:
        """The part, when it is there; what was not started is read now."""
        if self._coming is None or self._coming[0] != part:
            self.start(part)
        assert self._coming is not None
        begin = time.perf_counter()
        loaded = self._coming[1].result()
        self.seconds_waiting += time.perf_counter() - begin
        self._coming = None
        return loaded

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._coming = None

    def _read(self, part: Part) -> Loaded:
        begin = time.perf_counter()
        try:
            if self._device.type != "cuda":
                return self._weights.read(part)
            if self._stream is None:
                # One for all layers, because memory is used again within a stream only. On the default stream a copy
                # would wait for the kernels of the layer before.
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                loaded = self._weights.read(part)
                self._stream.synchronize()
            return loaded
        finally:
            self.seconds_reading += time.perf_counter() - begin
