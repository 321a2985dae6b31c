"""What to do when a device has no memory left: free what is cached, then use the CPU, and say so.

The algorithm is never exchanged for another one, and nothing is retried in silence: the steps taken are in the part.
"""

from __future__ import annotations

import gc
from typing import Any, Protocol

from moe_svd_distill.execution.parts import PartContent

FREED_CACHE = "freed the device's cache and tried again"
USED_CPU = "computed on the CPU"


class Unit(Protocol):
    """A piece of work that can be done anywhere; it must survive pickling."""

    @property
    def key(self) -> str:
        """The hash, in hex, of everything the result depends on."""

    @property
    def label(self) -> str:
        """What people call it, such as "layer 3"."""

    @property
    def weight(self) -> float:
        """What it costs, relative to the others; the heaviest go first."""


class Work(Protocol):
    """Computes a unit; it must survive pickling, and gives the same bytes wherever it runs."""

    def __call__(self, unit: Any, device: str) -> PartContent:
        """Compute ``unit`` on ``device``."""


def compute(work: Work, unit: Unit, device: str) -> tuple[PartContent, tuple[str, ...]]:
    """Compute a unit, stepping back when the device's memory runs out.

    Returns:
        The content, its record completed by the kind of device and the steps taken, and the steps.
    """
    steps: tuple[str, ...] = ()
    content = _attempt(work, unit, device)
    if content is None:
        _free(device)
        steps = (FREED_CACHE,)
        content = _attempt(work, unit, device)
    if content is None:
        _free(device)
        steps = (FREED_CACHE, USED_CPU)
        device = "cpu"
        content = work(unit, device)
    record = {**content.record, "device": device.split(":")[0]}  # not which GPU: that depends on chance
    if steps:
        record["backoff"] = list(steps)
    return PartContent(content.tensors, record), steps


def _attempt(work: Work, unit: Unit, device: str) -> PartContent | None:
    """None when memory ran out. The exception dies here, and with it the frames that hold the tensors."""
    try:
        return work(unit, device)
    except RuntimeError as error:
        if device == "cpu" or not _is_out_of_memory(error):
            raise
        return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "out of memory" in text or "_alloc_failed" in text  # CUDA itself, and its libraries


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
