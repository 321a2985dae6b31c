"""Several devices, or the cores of a processor, on one layer: batches go out in turn and come back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

_AHEAD = 2  # batches of each device under way, so that it has work while results are written


class Crew:
    """One thread for each device. Batch k is computed by device k modulo their number."""

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
        """Results of all batches in their order, on the CPU.

        Args:
            work: For each device, what to do with a batch.
            batches: Which sequences each batch has.
        """
        under_way: deque[tuple[slice, Future[Tensor]]] = deque()
        try:
            for number, rows in enumerate(batches):
                device = number % len(self.devices)
                under_way.append((rows, self._pools[device].submit(self._on, self.devices[device], work[device], rows)))
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

    @staticmethod
    def _on(device: torch.device, work: Callable[[slice], Tensor], rows: slice) -> Tensor:
        with torch.no_grad():
            if device.type != "cuda":
                return work(rows)
            with torch.cuda.device(device):
                return work(rows).to("cpu")
