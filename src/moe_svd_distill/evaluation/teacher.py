"""The teacher's one pass over the texts, in memory or layer by layer, and what is kept of it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

from moe_svd_distill.calibration.paired import PairedText
from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.evaluation.from_states import Progress, TeacherRecord, record_states
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.evaluation.resident import teacher_states
from moe_svd_distill.evaluation.streamed import stream_teacher


def teacher_pass(
    folder: str | Path, text: TokenizedText, *, vocabulary: int, device: str, on_progress: Progress | None = None
) -> TeacherRecord:
    """Load the teacher, record its pass over a text that the student reads in the same tokens, and let go of it."""
    return resident_records(folder, [PairedText.read_alike(text, vocabulary)], device, on_progress)[0]


def resident_records(
    folder: str | Path, texts: Sequence[PairedText], device: str, on_progress: Progress | None = None
) -> list[TeacherRecord]:
    """Load the teacher, record its pass over each text, and let go of it."""
    teacher = load_model(folder, device)
    records = []
    for text in texts:
        states = teacher_states(teacher, text.teacher, on_progress)
        records.append(record_states(*states, text, None if text.identical else on_progress))
    del teacher
    gc.collect()
    return records


def streamed_records(
    folder: str | Path, texts: Sequence[PairedText], cache: Path, device: str, on_progress: Progress | None = None
) -> list[TeacherRecord]:
    """Run a teacher of any size over all texts at once; its states stay in the cache."""
    states, head = stream_teacher(folder, [text.teacher for text in texts], cache, device, on_progress)
    return [record_states(hidden, head, text, on_progress) for hidden, text in zip(states, texts, strict=True)]
