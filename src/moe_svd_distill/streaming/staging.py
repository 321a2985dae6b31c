"""From a mapped file to a GPU by way of page-locked memory.

The driver copies pageable memory through a small buffer of its own, with one thread and waiting for each piece. Here
the processor's threads fill one page-locked buffer while the GPU empties the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BUFFER_BYTES = 64 << 20
_FEWEST_BYTES = 1 << 16  # below, a copy costs its launch, and the driver's own way is as good


class Staging:
    """Two page-locked buffers in turn; for one thread, and one stream."""

    def __init__(self, buffer_bytes: int = _BUFFER_BYTES) -> None:
        """Nothing is allocated yet.

        Args:
            buffer_bytes: Of each buffer.
        """
        self._size = buffer_bytes
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy on the current stream; the source may change or go once this returns.

        Args:
            target: On a GPU.
            source: On the CPU, of the same shape; the types may differ.
        """
        plain = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
        if not plain or source.nbytes < _FEWEST_BYTES:
            target.copy_(source)
            return
        into, out_of = target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8)
        for part in self._parts(len(out_of)):
            buffer, emptied = self._next()
            emptied.synchronize()
            staged = buffer[: part.stop - part.start]
            staged.copy_(out_of[part])
            into[part].copy_(staged, non_blocking=True)
            emptied.record()

    def _parts(self, size: int) -> Iterator[slice]:
        for begin in range(0, size, self._size):
            yield slice(begin, min(begin + self._size, size))

    def _next(self) -> tuple[Tensor, torch.cuda.Event]:
        if not self._buffers:
            for _ in range(2):
                buffer = torch.empty(self._size, dtype=torch.uint8, pin_memory=True)
                self._buffers.append((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]
        self._turn = 1 - self._turn
        return self._buffers[self._turn]
