"""Asking for the refusal of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_svd_distill.checkpoints import Checkpoint, open_checkpoint
from moe_svd_distill.errors import BadDataError, DistillError


def refusal(folder: Path, kind: type[DistillError] = BadDataError) -> DistillError:
    """The one error with which a folder is refused; a second look has to agree with it."""
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()
    faults = getattr(caught.value, "faults", None)
    if faults is not None:
        assert [fault.what for fault in Checkpoint(folder).look_again().faults] == list(faults)
    return caught.value
