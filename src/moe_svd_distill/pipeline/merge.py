"""Merge: the student that an adapter names, with the adapter in its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from moe_svd_distill.adapter.merge import MergeReport
from moe_svd_distill.adapter.merge import merge as merge_into
from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.execution.events import DOWNLOADING
from moe_svd_distill.pipeline.record import base_model
from moe_svd_distill.report.card import merged_card
from moe_svd_distill.report.record import RunRecord


def merge(
    adapter: Path | str,
    output: Path | str,
    student: Path | str | None = None,
    *,
    on_progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> MergeReport:
    """Write the student with the adapter merged into it, shard by shard, and a card that says so.

    Args:
        adapter: Its folder.
        output: Folder of the merged model.
        student: Folder or hub id; default: the one the adapter names.
        on_progress: Told a step, how much of it is done and how much there is to do, in bytes.

    Raises:
        DistillError: One of its kinds, each with its exit code.
    """
    base = base_model(adapter, None if student is None else str(student))
    record = RunRecord.in_folder(Path(adapter))
    named = replace(record, student=replace(record.student, source=base)) if student or not record.content else record
    with open_checkpoint(base, on_bytes=partial(on_progress, f"{DOWNLOADING}{base}")) as checkpoint:
        merging = partial(on_progress, "merging")
        merging(0, 0)
        return merge_into(adapter, checkpoint, output, card=merged_card(named), on_progress=merging)
