"""How much memory there is to use."""

from __future__ import annotations

import sys
from pathlib import Path

_SHARE = 0.25


def activation_budget() -> int:
    """Bytes that hidden states may take when nobody says how many: a quarter of what is free now."""
    import psutil

    return int(_SHARE * min(int(psutil.virtual_memory().available), _left_in_group()))


def _left_in_group() -> int:
    """What the control group of a container or a batch job leaves; very much where there is none."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
    except (OSError, ValueError, KeyError):
        return sys.maxsize
    return limit - int(used)
