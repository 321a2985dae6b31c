"""Processes that train one student together, each on its share of every step (torch's own distributed package)."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.errors import IncompleteError

_PATIENCE = timedelta(minutes=30)


class ProcessGroup:
    """All processes of a training run: as it is, this one alone.

    Attributes:
        number: Of this one, from 0.
        count: How many there are.
    """

    number, count = 0, 1

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes."""


def as_the_first_says(group: ProcessGroup, value: bool, device: torch.device) -> bool:
    """What the first process says of this: its clock counts."""
    if group.count == 1:
        return value
    flag = torch.tensor([float(value and group.number == 0)], device=device)
    group.add_up(flag)
    return bool(flag.item())


class Distributed(ProcessGroup):
    """Several processes, over gloo (CPU) or NCCL (CUDA)."""

    def __init__(self, number: int, count: int, address: str, device: torch.device) -> None:
        """Meet the others.

        Args:
            number: Of this process, from 0.
            count: How many there are.
            address: ``tcp://host:port`` that number 0 listens at.
            device: Where this one computes.
        """
        import torch.distributed as dist

        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.number, self.count = number, count
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # the loss is summed on the CPU
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, init_method=address, rank=number, world_size=count, timeout=_PATIENCE)
        self._reduce: Callable[[Tensor], Any] = dist.all_reduce
        self._leave: Callable[[], None] = dist.destroy_process_group

    def add_up(self, *tensors: Tensor) -> None:
        """As `ProcessGroup`.

        Raises:
            IncompleteError: One of the others is gone.
        """
        try:
            for tensor in tensors:
                if tensor.numel():
                    self._reduce(tensor)
        except RuntimeError as error:
            raise IncompleteError(
                "A process that trains with this one is gone",
                "Run the same command again; it goes on from the last save",
            ) from error

    def close(self) -> None:
        """Leave the others."""
        self._leave()
