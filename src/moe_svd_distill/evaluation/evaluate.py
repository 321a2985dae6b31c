"""What an adapter does to its student, measured on text that nothing was fitted on, beside controls."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_svd_distill.adapter.load_check import check_loads
from moe_svd_distill.adapter.random_control import write_random_control
from moe_svd_distill.calibration.text import (
    Document,
    TokenizedText,
    load_tokenizer,
    require_shared_vocabulary,
    split_documents,
    tokenize,
    without,
)
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.adapted import AdaptedStudent
from moe_svd_distill.evaluation.figures import Figures, Interval, Measurement, gap_intervals, plain
from moe_svd_distill.evaluation.figures import cross_entropy_gap_closed as cross_entropy_gap
from moe_svd_distill.evaluation.figures import kl_gap_closed as kl_gap
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.evaluation.resident import Progress, TeacherRecord, measure, record_teacher
from moe_svd_distill.evaluation.verdict import Effect, effect_of, sentence


@dataclass(frozen=True)
class GapClosed:
    """Percent of the way from the untouched student to the teacher; None where the student is not behind.

    Attributes:
        kl: (before − after) / before, of KL to the teacher.
        cross_entropy: (before − after) / (before − teacher's), of cross-entropy.
        kl_interval: 95 % bootstrap interval over documents.
        cross_entropy_interval: The same.
    """

    kl: float | None
    cross_entropy: float | None
    kl_interval: Interval | None = None
    cross_entropy_interval: Interval | None = None


@dataclass(frozen=True)
class Control:
    """The student with a random delta of the adapter's norms in its place."""

    seed: int
    figures: Figures
    gap_closed: GapClosed


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one held-out text.

    Attributes:
        effect: In one word, from figures beyond noise.
        verdict: In one or two sentences, for the user.
        teacher: The teacher itself.
        student: The untouched student.
        adapted: The student with the adapter as PEFT loads it.
        gap_closed: What the adapter closes.
        controls: Random deltas of equal norm, one for each seed.
        vocabulary: Tokens the distributions are taken over.
        sequence_length: Tokens of a sequence.
        unit: What the standard errors treat as independent: documents or sequences.
        seconds: Wall time.
    """

    effect: Effect
    verdict: str
    teacher: Figures
    student: Figures
    adapted: Figures
    gap_closed: GapClosed
    controls: tuple[Control, ...]
    vocabulary: int
    sequence_length: int
    unit: str
    seconds: float

    @property
    def control_gap_closed(self) -> GapClosed | None:
        """The controls' mean; None without controls."""
        return _mean_gap([control.gap_closed for control in self.controls]) if self.controls else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        control = self.control_gap_closed
        return {
            **plain(self),
            "teacher": self.teacher.as_dict(),
            "student": self.student.as_dict(),
            "adapted": self.adapted.as_dict(),
            "controls": [{**plain(control), "figures": control.figures.as_dict()} for control in self.controls],
            "control_gap_closed": None if control is None else plain(control),
        }


def evaluate(
    adapter_folder: str | Path,
    teacher_folder: str | Path,
    student_folder: str | Path,
    documents: Sequence[Document],
    *,
    limit_tokens: int | None = 50_000,
    length: int = 512,
    seed: int = 0,
    controls: int = 1,
    used: Collection[str] = (),
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure the teacher, the untouched student, the adapter as PEFT loads it and random controls.

    One model is in memory at a time.

    Args:
        adapter_folder: The adapter.
        teacher_folder: Local folder of the teacher.
        student_folder: Local folder of the student.
        documents: Text from `read_documents`; read in an order drawn from the seed up to the limit.
        limit_tokens: Tokens to read at most.
        length: Tokens of a sequence.
        seed: Of the order of documents, the controls and the bootstrap.
        controls: How many random deltas to measure.
        used: Digests of documents the adapter was fitted or scaled on; these are left out.
        device: Where the models run.
        on_progress: Told about every batch.
    """
    comparison = require_shared_vocabulary(teacher_folder, student_folder)
    fresh = without(documents, used)
    if not fresh:
        raise BadDataError("All of the text was used to make the adapter", "Name text the adapter has not seen")
    ordered = split_documents(fresh, {"held-out": 1.0}, seed)["held-out"]
    text = tokenize(ordered, load_tokenizer(student_folder), limit_tokens, length=length, vocabulary=comparison.shared)
    check_loads(adapter_folder, student_folder)
    with random_controls(adapter_folder, range(seed, seed + controls)) as folders:
        record = teacher_pass(
            teacher_folder, text, vocabulary=comparison.shared, device=device, on_progress=on_progress
        )
        student = load_model(student_folder, device)
        return evaluate_resident(student, record, adapter_folder, seed=seed, controls=folders, on_progress=on_progress)


@contextmanager
def random_controls(adapter_folder: str | Path, seeds: Iterable[int]) -> Iterator[dict[int, Path]]:
    """Write random adapters of the same norms into a temporary folder, one for each seed."""
    with tempfile.TemporaryDirectory() as folder:
        written = {seed: Path(folder) / str(seed) for seed in seeds}
        for seed, path in written.items():
            write_random_control(adapter_folder, path, seed)
        yield written


def teacher_pass(
    folder: str | Path, text: TokenizedText, *, vocabulary: int, device: str, on_progress: Progress | None = None
) -> TeacherRecord:
    """Load the teacher, record its pass, and let go of it."""
    teacher = load_model(folder, device)
    record = record_teacher(teacher, text, vocabulary=vocabulary, on_progress=on_progress)
    del teacher
    gc.collect()
    return record


def evaluate_resident(
    student: Any,
    record: TeacherRecord,
    adapter_folder: str | Path,
    *,
    seed: int = 0,
    controls: Mapping[int, Path] | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure an adapter on a student in memory; the student comes out as it went in.

    Args:
        student: A transformers causal language model.
        record: The teacher's pass over the text.
        adapter_folder: The adapter.
        seed: Of the bootstrap.
        controls: Seed to folder of the random adapters to measure beside it (see `random_controls`).
        on_progress: Told about every batch.
    """
    start = time.monotonic()
    before = measure(student, record, name="student", on_progress=on_progress)
    after = _with_adapter(student, record, adapter_folder, "adapter", on_progress)
    kl_interval, entropy_interval = gap_intervals(before, after, record.measurement, seed=seed)
    gap = _gap(before, after, record.measurement, kl_interval, entropy_interval)
    measured = tuple(
        _control(student, record, before, control_seed, folder, on_progress)
        for control_seed, folder in (controls or {}).items()
    )
    effect = effect_of(before, after)
    control_gap = _mean_gap([control.gap_closed for control in measured]).kl if measured else None
    return Evaluation(
        effect=effect,
        verdict=sentence(
            effect, gap.kl, gap.kl_interval, gap.cross_entropy, control_gap, before.figures, after.figures
        ),
        teacher=record.measurement.figures,
        student=before.figures,
        adapted=after.figures,
        gap_closed=gap,
        controls=measured,
        vocabulary=record.vocabulary,
        sequence_length=record.text.length,
        unit=record.text.unit,
        seconds=time.monotonic() - start,
    )


def _with_adapter(
    student: Any, record: TeacherRecord, folder: str | Path, name: str, on_progress: Progress | None
) -> Measurement:
    adapted = AdaptedStudent.load(student, folder)
    try:
        return measure(adapted.model, record, name=name, on_progress=on_progress)
    finally:
        adapted.detach()


def _control(
    student: Any, record: TeacherRecord, before: Measurement, seed: int, folder: Path, on_progress: Progress | None
) -> Control:
    after = _with_adapter(student, record, folder, "control", on_progress)
    return Control(seed, after.figures, _gap(before, after, record.measurement))


def _gap(
    before: Measurement,
    after: Measurement,
    teacher: Measurement,
    kl_interval: Interval | None = None,
    cross_entropy_interval: Interval | None = None,
) -> GapClosed:
    old, new = before.figures, after.figures
    return GapClosed(
        kl_gap(old.kl, new.kl),
        cross_entropy_gap(old.cross_entropy, new.cross_entropy, teacher.figures.cross_entropy),
        kl_interval,
        cross_entropy_interval,
    )


def _mean_gap(gaps: Sequence[GapClosed]) -> GapClosed:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    return GapClosed(mean([gap.kl for gap in gaps]), mean([gap.cross_entropy for gap in gaps]))
