"""What an adapter does to its student, measured on text that nothing was fitted on, beside controls."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_svd_distill.adapter.random_control import write_random_control
from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.calibration.documents import Document, in_drawn_order, without
from moe_svd_distill.calibration.domain import domain_distance
from moe_svd_distill.calibration.paired import PairedText, PairTokenizers
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.continuations import Continuations
from moe_svd_distill.evaluation.from_states import Reader, TeacherRecord, compare
from moe_svd_distill.evaluation.loading import dtype_name, load_model, residency_of
from moe_svd_distill.evaluation.request import EvaluationRequest, Progress
from moe_svd_distill.evaluation.result import Control, Evaluation, effect_of
from moe_svd_distill.evaluation.sources import PredictingRows, resident_records, streamed_records
from moe_svd_distill.evaluation.student import ResidentStudent, StreamedStudent, Student
from moe_svd_distill.evaluation.temperature import TemperatureCurve, TemperatureReader, temperature_control
from moe_svd_distill.evaluation.uncertainty import Bootstrap, gap_between

FIT_TOKENS = 4_096  # of calibration text for one temperature, which is one number
STREAMED = "it was read layer by layer and not held in memory"


def evaluate(
    request: EvaluationRequest,
    teacher_folder: str | Path,
    student_folder: str | Path,
    documents: Sequence[Document],
    calibration: Sequence[Document] = (),
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure the teacher, the untouched student, the adapter as PEFT loads it, random controls and one temperature.

    One model is in memory at a time, or one layer of it.

    Args:
        request: What to measure, and how.
        teacher_folder: Local folder of the teacher.
        student_folder: Local folder of the student.
        documents: Text from `read_text`; read in an order drawn from the seed up to the limit.
        calibration: Other text to fit the temperature control on; by default one half of the documents read.
        on_progress: Told about every batch.

    Raises:
        IncompatiblePairError: The models have different vocabularies, or for `shared` nothing in common.
        BadDataError: There is no text, PEFT would not load the adapter whole, or figures are not finite.
        UsageError: A model is asked to be resident and does not fit.
    """
    start, device, dtype, seed = time.monotonic(), request.device, request.torch_dtype, request.seed
    tokenizers = PairTokenizers(teacher_folder, student_folder, request.vocabulary or "equal")
    texts = _texts(request, tokenizers, documents, calibration)
    read = [text.student for text in texts]
    check_loads(request.adapter, student_folder)
    of_teacher, of_student = (
        residency_of(Path(folder), device, request.mode, dtype) for folder in (teacher_folder, student_folder)
    )
    written = Continuations.of(texts[0].student, student_folder)
    with ExitStack() as stack:
        seeds = range(seed, seed + request.controls)
        controls = stack.enter_context(_random_controls(request.adapter, seeds, student_folder))
        if of_teacher == "resident":

            def write(teacher: Any) -> None:
                nonlocal written
                written = written.by("teacher", teacher, teacher_folder)

            records = resident_records(teacher_folder, texts, device, on_progress, write, dtype)
        else:
            written = written.without("teacher", STREAMED)
            records = streamed_records(teacher_folder, texts, request.cache_folder, device, on_progress, dtype)
        kept = [record.hidden.states.path for record in records[:1] if isinstance(record.hidden, PredictingRows)]
        source: Student
        if of_student == "resident":
            source = ResidentStudent(load_model(student_folder, device, dtype))
        else:
            streamed = StreamedStudent(student_folder, read, request.cache_folder, device=device, dtype=dtype)
            source = stack.enter_context(streamed)
        result = evaluate_student(
            source, records, request.adapter, seed=seed, controls=controls, on_progress=on_progress
        )
        kept += source.kept
        dtypes = {"teacher": dtype_name(records[0].hidden.dtype), "student": dtype_name(source.dtype)}
        written = _student_writes(written, source, student_folder, request.adapter)
    return replace(
        result,
        domain=domain_distance(read[1], read[0], seed=seed) if len(read) > 1 else None,
        places={"teacher": of_teacher, "student": of_student},
        dtypes=dtypes,
        kept_states=tuple(map(str, kept)),
        continuations=written,
        seconds=time.monotonic() - start,
    )


def _student_writes(written: Continuations, source: Student, folder: str | Path, adapter: Path) -> Continuations:
    """With and without the adapter, where it is in memory: token by token, a pass over its files is too much."""
    if not isinstance(source, ResidentStudent):
        return written.without("student", STREAMED).without("adapted", STREAMED)
    written = written.by("student", source.model, folder)
    with source.adapted(adapter) as model:
        return written.by("adapted", model, folder)


def _texts(
    request: EvaluationRequest,
    tokenizers: PairTokenizers,
    documents: Sequence[Document],
    calibration: Sequence[Document],
) -> list[PairedText]:
    """The held-out text, and after it the text to fit a temperature on if there is enough of it."""
    if not documents:
        raise BadDataError("All of the text was used to make the adapter", "Name text the adapter has not seen")
    ordered = in_drawn_order(documents, request.seed)
    texts = [tokenizers.first(ordered, request.tokens, length=request.length, seed=request.seed)]
    others = without(calibration, texts[0].student.digests)
    with suppress(BadDataError):  # less than a sequence of it: then half of the text itself is what T is fitted on
        texts.append(tokenizers.first(others, FIT_TOKENS, length=request.length, seed=request.seed))
    return texts


@contextmanager
def _random_controls(
    adapter_folder: Path, seeds: Iterable[int], student_folder: str | Path
) -> Iterator[dict[int, Path]]:
    """Random adapters of the same norms in a temporary folder, one for each seed."""
    with tempfile.TemporaryDirectory() as folder:
        written = {seed: Path(folder) / str(seed) for seed in seeds}
        for seed, path in written.items():
            write_random_control(adapter_folder, path, seed, student_folder)
        yield written


def evaluate_student(
    source: Student,
    records: Sequence[TeacherRecord],
    adapter_folder: str | Path,
    *,
    seed: int = 0,
    controls: Mapping[int, Path] | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure an adapter on a student.

    Args:
        source: The student; it comes out as it went in.
        records: The teacher's pass over the text, and after it that over the text to fit the temperature on; by default
            half of the documents.
        adapter_folder: The adapter.
        seed: Of the bootstrap.
        controls: Seed to folder of the random adapters to measure beside it.
        on_progress: Told about every batch.
    """
    start, record = time.monotonic(), records[0]
    teacher, bootstrap = record.measurement, Bootstrap(len(record.measurement.tokens), seed=seed)

    def with_adapter(folder: Path, name: str) -> Measurement:
        return _measured(source, record, folder, name, on_progress)

    curve = _temperature_curve(source, record, "student", on_progress)
    before = curve.untouched
    fitted = [_temperature_curve(source, fit, "student on calibration text", on_progress) for fit in records[1:]]
    after = with_adapter(Path(adapter_folder), "adapter")
    measured = []
    for control_seed, folder in (controls or {}).items():
        control = with_adapter(folder, "control")
        gap = gap_between(before, control, teacher, bootstrap)
        measured.append(Control(control_seed, bootstrap.figures(control), gap))
    gap = gap_between(before, after, teacher, bootstrap)
    temperature = temperature_control(curve, fitted[0] if fitted else None, after, teacher, seed)
    return Evaluation(
        effect=effect_of(
            before,
            after,
            kl_interval=gap.kl_interval,
            ahead_of_temperature=temperature.adapter_ahead if temperature else None,
        ),
        teacher=bootstrap.figures(teacher),
        student=bootstrap.figures(before),
        adapted=bootstrap.figures(after),
        gap_closed=gap,
        controls=tuple(measured),
        temperature_control=temperature,
        vocabulary=record.vocabulary,
        sequence_length=record.text.length,
        unit=record.text.unit,
        seconds=time.monotonic() - start,
        places={"student": source.place},
        aligned=record.aligned,
    )


def _measured(
    source: Student,
    record: TeacherRecord,
    adapter: Path | None,
    name: str,
    on_progress: Progress | None,
    readers: Sequence[Reader] = (),
) -> Measurement:
    with source.reading(record.text, adapter, name, on_progress) as (blocks, logits):
        return compare(blocks, logits, record, name, readers)


def _temperature_curve(
    source: Student, record: TeacherRecord, name: str, on_progress: Progress | None
) -> TemperatureCurve:
    """Measure the untouched student, and what it would be at other temperatures, in one pass."""
    reader = TemperatureReader(record.units)
    return reader.curve(_measured(source, record, None, name, on_progress, (reader,)))
