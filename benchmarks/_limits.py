"""Limits on the memory of a process."""

from __future__ import annotations

import os
from pathlib import Path


def memory_group(limit: int) -> Path | None:
    """A memory cgroup of our own, version 1 or 2, or None where the machine does not let us make one."""
    own = Path("/proc/self/cgroup").read_text().splitlines()
    for line in own:
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup/memory") if "memory" in controllers.split(",") else Path("/sys/fs/cgroup")
        if controllers and "memory" not in controllers.split(","):
            continue  # another version-1 controller
        for parent in (root / path.lstrip("/"), root):
            group = parent / f"soak-{os.getpid()}"
            file = "memory.limit_in_bytes" if controllers else "memory.max"
            try:
                group.mkdir(exist_ok=True)
                (group / file).write_text(str(limit))
            except OSError:
                continue
            return group
    return None
