"""A stand-in in place of wandb."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import stand_in_wandb


@contextmanager
def wandb_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in in place of wandb, here and in other processes; the file that it writes to."""
    modules, written = folder / "modules", folder / "written.jsonl"
    modules.mkdir()
    shutil.copy(str(stand_in_wandb.__file__), modules / "wandb.py")
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(modules), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_STAND_IN", str(written))
    yield written
    sys.modules.pop("wandb", None)
