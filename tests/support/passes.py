"""How streamed passes run in tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moe_svd_distill.streaming import stream


@contextmanager
def a_journal_of_every_layer() -> Iterator[None]:
    """A pass that is stopped in a test has come a few milliseconds far."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "JOURNAL_SECONDS", 0.0)
        yield


@contextmanager
def one_thread_and_a_journal_of_every_layer() -> Iterator[None]:
    """Tiny models gain nothing by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with a_journal_of_every_layer():
        yield
    torch.set_num_threads(before)
