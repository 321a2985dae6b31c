"""How much memory there is to use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SHARE = 0.25
_GROUPS = Path("/sys/fs/cgroup")


def activation_budget(device: torch.device | None = None) -> int:
    """Bytes that hidden states may take when nobody says how many: a quarter of what is free now.

    Args:
        device: A GPU; None for the machine's memory.
    """
    return int(_SHARE * (free_memory() if device is None else _free_on(device)))


def _free_on(device: torch.device) -> int:
    """Bytes that are free on a GPU, those included that torch holds back for its next tensors."""
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def free_memory() -> int:
    """Bytes of memory that are free now, in this machine and in the container or batch job."""
    import psutil

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
