"""Merge: the student that an adapter names, with the adapter in its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_svd_distill.adapter.merge import MergeReport
from moe_svd_distill.adapter.merge import merge as merge_into
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.pipeline.record import base_model


def merge(
    adapter: Path | str,
    output: Path | str,
    student: Path | str | None = None,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Write the student with the adapter merged into it, shard by shard.

    Args:
        adapter: Its folder.
        output: Folder of the merged model.
        student: Folder or hub id; default: the one the adapter names.
        on_progress: Told how many tensors of how many are done.

    Raises:
        DistillError: One of its kinds, each with its exit code.
    """
    with open_checkpoint(base_model(adapter, None if student is None else str(student))) as checkpoint:
        return merge_into(adapter, checkpoint, output, on_progress=on_progress)
