"""Reading a part's weights into memory, each stored byte once, in a thread of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from moe_svd_distill.algebra.dtypes import count_not_finite
from moe_svd_distill.architecture.skeleton import ParameterSlot, Part
from moe_svd_distill.architecture.stored import CheckpointMap, TensorSource
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.memory import MemoryWatch
from moe_svd_distill.streaming.devices import Staging
from moe_svd_distill.streaming.overlay import AdapterOverlay
from moe_svd_distill.streaming.tables import StoredTable, not_finite


class _LoadedPart(NamedTuple):
    """A part in memory: the base model's tensors by slot, the adapter's by key."""

    base: list[tuple[ParameterSlot, Tensor]]
    adapter: dict[str, Tensor]


class WeightReader:
    """Reads parts, one while the devices compute, puts them into the skeleton and takes them out again.

    Attributes:
        bytes_read: Stored bytes of the base model read so far.
        seconds_reading: The reading thread at work.
        seconds_waiting: The caller waiting for it.
        watch: The largest memory seen while weights were read.
    """

    def __init__(
        self,
        stored: CheckpointMap,
        device: torch.device,
        overlay: AdapterOverlay | None = None,
        tables: Mapping[ParameterSlot, StoredTable] | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            stored: Where the values lie, and the skeleton that is filled.
            device: Where to.
            overlay: An adapter around the skeleton.
            tables: Embeddings that stay in their files.
        """
        self._stored, self._device, self._overlay, self._tables = stored, device, overlay, tables or {}
        self._staging = Staging() if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._coming: tuple[Part, Future[_LoadedPart]] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._sound: set[str] = set()
        self.watch = MemoryWatch()
        self.bytes_read = 0
        self.seconds_reading = self.seconds_waiting = 0.0

    def prefetch(self, part: Part) -> None:
        """Begin to read a part, unless another one is being read."""
        if self._coming is None:
            self._coming = (part, self._thread.submit(self._read, part))

    def attach(self, part: Part, *, here: bool = False) -> None:
        """Put a part into the skeleton when it is there, with the adapter around it as PEFT puts it.

        Another part that is being read meanwhile is let go of.

        Args:
            part: Which.
            here: Whether it is read by the caller's thread, on its own stream.

        Raises:
            BadDataError: A file was cut off or changed, a value is not finite, or the adapter does not fit.
        """
        loaded = self._load(part) if here else self._take(part)
        if self._overlay is not None:
            self._overlay.load(part, loaded.adapter, self._device)
            loaded.adapter.clear()
        while loaded.base:
            slot, tensor = loaded.base.pop()
            slot.fill(tensor)
        if self._overlay is not None:
            self._overlay.settle(part, self._device)
        self.watch.look()

    def release(self, part: Part) -> None:
        """Let go of a part, once nothing on its way to the device needs it any more.

        The memory goes back to the stream that layers are read on, which would fill it again at once, while kernels
        that were started on another stream may still be waiting to read from it.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        if self._overlay is not None:
            self._overlay.release(part)
        self._stored.skeleton.clear(part)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._coming = None

    def _take(self, part: Part) -> _LoadedPart:
        begin = time.perf_counter()
        if self._coming is not None and self._coming[0] != part:
            self._coming[1].result()
            self._coming = None
        self.prefetch(part)
        assert self._coming is not None
        loaded = self._coming[1].result()
        self.seconds_waiting += time.perf_counter() - begin
        self._coming = None
        return loaded

    def _read(self, part: Part) -> _LoadedPart:
        """In the thread, and on a GPU on a stream of its own."""
        begin = time.perf_counter()
        try:
            if self._device.type != "cuda":
                return self._load(part)
            if self._stream is None:
                # One for all layers, because memory is used again within a stream only. On the default stream a copy
                # would wait for the kernels of the layer before.
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                loaded = self._load(part)
                self._stream.synchronize()
            return loaded
        finally:
            self.seconds_reading += time.perf_counter() - begin

    @torch.no_grad()
    def _load(self, part: Part) -> _LoadedPart:
        """Read a part into memory of its own on the device, converted to the type it is held in."""
        base: list[tuple[ParameterSlot, Tensor]] = []
        sources = [source for source in self._stored.of_part[part] if source.slots[0] not in self._tables]
        self._stored.checkpoint.prefetch(name for source in sources for name in _stored_names(source))
        for source in self._stored.of_part[part]:
            if (table := self._tables.get(source.slots[0])) is not None:
                base.append((source.slots[0], table))
            else:
                filled = self._copied(source) if source.pieces else self._converted(source)
                self._refuse_not_finite(source, filled)
                base += filled
        return _LoadedPart(base, {} if self._overlay is None else self._overlay.read(part))

    def _copied(self, source: TensorSource) -> list[tuple[ParameterSlot, Tensor]]:
        """Copy stored tensors straight to where they belong: no second copy exists at any time."""
        slot = source.slots[0]
        whole = torch.empty(slot.shape, dtype=slot.dtype, device=self._device)
        for piece in source.pieces:
            stored = self._fetch(piece.hub_name)
            region = piece.within(whole)
            if region.shape != stored.shape:
                found, expected = ("×".join(map(str, shape)) for shape in (stored.shape, region.shape))
                raise BadDataError(f"{piece.hub_name} is {found}, expected {expected}", "Fetch the model again")
            if self._staging is None or stored.device.type != "cpu":
                region.copy_(stored)
            else:
                self._staging.copy(region, stored)
            self.watch.look()
        return [(slot, whole)]

    def _converted(self, source: TensorSource) -> list[tuple[ParameterSlot, Tensor]]:
        kind = source.slots[0].dtype
        stored = (self._fetch(name).to(self._device, kind, copy=True) for name in source.hub_names)
        made = source.convert(stored, self._stored.names)
        self.watch.look()
        # A converter may return views of one tensor, or a stored one that is not contiguous.
        return [(slot, made[slot.name].to(slot.dtype).contiguous()) for slot in source.slots]

    def _refuse_not_finite(self, source: TensorSource, filled: list[tuple[ParameterSlot, Tensor]]) -> None:
        """Looked for where the values are computed with, once for each tensor; then the stored ones say which it is."""
        for slot, tensor in filled:
            if slot.name in self._sound or not count_not_finite(tensor):
                self._sound.add(slot.name)
                continue
            checkpoint = self._stored.checkpoint
            for name in source.hub_names:
                if count_not_finite(stored := checkpoint.read(name)):
                    raise not_finite(checkpoint.title, name, stored)
            raise BadDataError(
                f"{checkpoint.title}: {slot.name} has values that {slot.dtype} does not reach",
                "Compute in a wider type",
            )

    def _fetch(self, hub_name: str) -> Tensor:
        # What is quantised is dequantised where it is needed; anything else is copied from the file to its slot.
        checkpoint = self._stored.checkpoint
        tensor = checkpoint.read(hub_name, device="cpu" if checkpoint.quantisation is None else self._device)
        self.bytes_read += checkpoint[hub_name].bytes
        return tensor


def _stored_names(source: TensorSource) -> list[str]:
    return [piece.hub_name for piece in source.pieces] or list(source.hub_names)
