"""What devices have to give: free memory, a thread for each of them, and fast copies to a GPU."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

_SHARE = 0.25
_GROUPS = Path("/sys/fs/cgroup")
_AHEAD = 2  # batches of each device under way, so that it has work while results are written
_BUFFER_BYTES = 64 << 20
_FEWEST_BYTES = 1 << 16  # below, a copy costs its launch, and the driver's own way is as good


def activation_budget(device: torch.device | None = None) -> int:
    """Bytes that hidden states may take when nobody says how many: a quarter of what is free now.

    Args:
        device: A GPU; None for the machine's memory.
    """
    if device is None:
        return int(_SHARE * free_memory())
    held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # for torch's next tensors
    return int(_SHARE * (int(torch.cuda.mem_get_info(device)[0]) + held_back))


def free_memory() -> int:
    """Bytes of memory that are free now, in this machine and in the container or batch job."""
    return max(0, min(int(psutil.virtual_memory().available), _left_in_groups()))


def _left_in_groups() -> int:
    """What the control groups of a container or a batch job leave; very much where there is none."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return sys.maxsize
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    own = _GROUPS / path
    return min(_left(group) for group in (own, *own.parents) if group.is_relative_to(_GROUPS))


def _left(group: Path) -> int:
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
    except (OSError, ValueError, KeyError):
        return sys.maxsize
    return limit - int(used)


class DevicePool:
    """Several devices, or the cores of a processor, on one layer: one thread for each, which are used in turn."""

    def __init__(self, devices: Sequence[torch.device], threads: int | None = None) -> None:
        """Start no thread yet.

        Args:
            devices: One of them may be named more than once.
            threads: That torch may use for an operation on each; None leaves it as it is.
        """
        self.devices = tuple(devices)
        self._before = torch.get_num_threads() if threads else None
        prepare = partial(torch.set_num_threads, threads) if threads else None
        self._pools = [
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"device-{number}", initializer=prepare)
            for number, _ in enumerate(self.devices)
        ]

    def map(
        self, work: Sequence[Callable[[slice], Tensor]], batches: Sequence[slice]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Results of all batches in their order, on the CPU; batch k is computed by device k modulo their number.

        Args:
            work: For each device, what to do with a batch.
            batches: Which sequences each batch has.
        """
        under_way: deque[tuple[slice, Future[Tensor]]] = deque()
        try:
            for number, rows in enumerate(batches):
                turn = number % len(self.devices)
                under_way.append((rows, self._pools[turn].submit(_on, self.devices[turn], work[turn], rows)))
                if len(under_way) >= _AHEAD * len(self.devices):
                    done, result = under_way.popleft()
                    yield done, result.result()
            while under_way:
                done, result = under_way.popleft()
                yield done, result.result()
        finally:
            for _, future in under_way:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
        if self._before is not None:
            torch.set_num_threads(self._before)  # some libraries under torch have one number for the whole process


def _on(device: torch.device, work: Callable[[slice], Tensor], rows: slice) -> Tensor:
    with torch.no_grad():
        if device.type != "cuda":
            return work(rows)
        with torch.cuda.device(device):
            return work(rows).to("cpu")


class Staging:
    """From a mapped file to a GPU by way of two page-locked buffers in turn; for one thread, and one stream.

    The driver copies pageable memory through a small buffer of its own, with one thread and waiting for each piece.
    Here the processor's threads fill one page-locked buffer while the GPU empties the other.
    """

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
        for begin in range(0, len(out_of), self._size):
            part = slice(begin, min(begin + self._size, len(out_of)))
            buffer, emptied = self._next()
            emptied.synchronize()
            staged = buffer[: part.stop - part.start]
            staged.copy_(out_of[part])
            into[part].copy_(staged, non_blocking=True)
            emptied.record()

    def _next(self) -> tuple[Tensor, torch.cuda.Event]:
        if not self._buffers:
            for _ in range(2):
                buffer = torch.empty(self._size, dtype=torch.uint8, pin_memory=True)
                self._buffers.append((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]
        self._turn = 1 - self._turn
        return self._buffers[self._turn]
