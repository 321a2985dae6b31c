"""The teacher's one pass over the texts, in memory or layer by layer, and what is kept of it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.evaluation.aligned import align_teacher
from moe_svd_distill.evaluation.from_states import Progress, Record, TeacherRecord
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.evaluation.resident import record_teacher, teacher_states
from moe_svd_distill.evaluation.streamed import record_teacher_streamed, stream_teacher


def teacher_pass(
    folder: str | Path, text: TokenizedText, *, vocabulary: int, device: str, on_progress: Progress | None = None
) -> TeacherRecord:
    """Load the teacher, record its pass, and let go of it."""
    teacher = load_model(folder, device)
    record = record_teacher(teacher, text, vocabulary=vocabulary, on_progress=on_progress)
    del teacher
    gc.collect()
    return record


def resident_records(
    folder: str | Path, texts: Sequence[PairedText], device: str, on_progress: Progress | None = None
) -> list[Record]:
    """Load the teacher, record its pass over each text, and let go of it."""
    teacher = load_model(folder, device)
    records: list[Record] = []
    for text in texts:
        if text.identical:
            size = len(text.student_ids)
            records.append(record_teacher(teacher, text.student, vocabulary=size, on_progress=on_progress))
        else:
            records.append(align_teacher(teacher_states(teacher, text.teacher, on_progress), text, on_progress))
    del teacher
    gc.collect()
    return records


def streamed_records(
    folder: str | Path, texts: Sequence[PairedText], cache: Path, device: str, on_progress: Progress | None = None
) -> list[Record]:
    """Run a teacher of any size over all texts at once; its states stay in the cache."""
    read = [text.teacher for text in texts]
    if texts[0].identical:
        size = len(texts[0].student_ids)
        return [*record_teacher_streamed(folder, read, cache, vocabulary=size, device=device, on_progress=on_progress)]
    states = stream_teacher(folder, read, cache, device, on_progress)
    return [align_teacher(one, text, on_progress) for one, text in zip(states, texts, strict=True)]
