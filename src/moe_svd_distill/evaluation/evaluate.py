"""What an adapter does to its student, measured on text that nothing was fitted on, beside controls."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_svd_distill.adapter.random_control import write_random_control
from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.algebra.figures import Measurement, halves
from moe_svd_distill.calibration.domain import DomainDistance, domain_distance
from moe_svd_distill.calibration.paired import VocabularyMode
from moe_svd_distill.calibration.text import Document
from moe_svd_distill.evaluation.bootstrap import Bootstrap
from moe_svd_distill.evaluation.from_states import Progress, Reader, TeacherRecord, compare
from moe_svd_distill.evaluation.loading import load_model
from moe_svd_distill.evaluation.resident import ResidentStudent
from moe_svd_distill.evaluation.result import (
    Control,
    Evaluation,
    TemperatureControl,
    gap_between,
    mean_gap,
)
from moe_svd_distill.evaluation.sources import Mode, StudentSource, place_of
from moe_svd_distill.evaluation.streamed import PredictingRows, StreamedStudent
from moe_svd_distill.evaluation.teacher import resident_records, streamed_records, teacher_pass
from moe_svd_distill.evaluation.temperature import HIGHEST, LOWEST, TemperatureCurve, TemperatureReader
from moe_svd_distill.evaluation.texts import FIT_TOKENS, evaluation_texts
from moe_svd_distill.evaluation.verdict import effect_of, sentence

__all__ = ["FIT_TOKENS", "evaluate", "evaluate_student", "random_controls", "teacher_pass"]

_EDGE = 1.01


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
    calibration: Sequence[Document] = (),
    device: str = "cpu",
    mode: Mode = "auto",
    cache: str | Path | None = None,
    vocabulary: VocabularyMode = "equal",
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure the teacher, the untouched student, the adapter as PEFT loads it, random controls and one temperature.

    One model is in memory at a time, or one layer of it.

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
        calibration: Other text to fit the temperature control on; by default one half of the documents read.
        device: Where the models run.
        mode: Whether models are held in memory; `auto` decides for each of them by the free memory.
        cache: Where streamed states lie, by default `cache` in the adapter's folder. Those of the teacher and of the
            untouched student stay there for the next evaluation on the same text.
        vocabulary: `equal` demands that both models number their tokens alike. `shared` takes any two tokenizers and
            compares what they have in common, at the places where both have read the same characters.
        on_progress: Told about every batch.

    Raises:
        IncompatiblePairError: The models have different vocabularies, or for `shared` nothing in common.
        BadDataError: No text is left, PEFT would not load the adapter whole, or figures are not finite.
        UsageError: A model is asked to be resident and does not fit.
    """
    start = time.monotonic()
    texts = evaluation_texts(
        documents,
        calibration,
        used,
        teacher_folder,
        student_folder,
        limit_tokens=limit_tokens,
        length=length,
        seed=seed,
        mode=vocabulary,
    )
    read = [text.student for text in texts]
    check_loads(adapter_folder, student_folder)
    cached = Path(adapter_folder) / "cache" if cache is None else Path(cache)
    teacher_place, student_place = (place_of(Path(folder), device, mode) for folder in (teacher_folder, student_folder))
    with ExitStack() as stack:
        random_folders = stack.enter_context(
            random_controls(adapter_folder, range(seed, seed + controls), student_folder)
        )
        if teacher_place == "resident":
            records = resident_records(teacher_folder, texts, device, on_progress)
        else:
            records = streamed_records(teacher_folder, texts, cached, device, on_progress)
        kept = [record.hidden.states.path for record in records[:1] if isinstance(record.hidden, PredictingRows)]
        source: ResidentStudent | StreamedStudent
        if student_place == "resident":
            source = ResidentStudent(load_model(student_folder, device))
        else:
            source = stack.enter_context(StreamedStudent(student_folder, read, cached, device=device))
        result = evaluate_student(
            source,
            records[0],
            adapter_folder,
            seed=seed,
            controls=random_folders,
            fit=records[1] if len(records) > 1 else None,
            domain=domain_distance(read[1], read[0], seed=seed) if len(read) > 1 else None,
            on_progress=on_progress,
        )
        kept += source.kept
    return replace(
        result,
        places={"teacher": teacher_place, "student": student_place},
        kept_states=tuple(map(str, kept)),
        seconds=time.monotonic() - start,
    )


@contextmanager
def random_controls(
    adapter_folder: str | Path, seeds: Iterable[int], student_folder: str | Path | None = None
) -> Iterator[dict[int, Path]]:
    """Write random adapters of the same norms into a temporary folder, one for each seed.

    Args:
        adapter_folder: The adapter.
        seeds: One random adapter for each.
        student_folder: The student, which a head that is saved whole needs; by default the one the adapter names.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = {seed: Path(folder) / str(seed) for seed in seeds}
        for seed, path in written.items():
            write_random_control(adapter_folder, path, seed, student_folder)
        yield written


def evaluate_student(
    source: StudentSource,
    record: TeacherRecord,
    adapter_folder: str | Path,
    *,
    seed: int = 0,
    controls: Mapping[int, Path] | None = None,
    fit: TeacherRecord | None = None,
    domain: DomainDistance | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure an adapter on a student.

    Args:
        source: The student; it comes out as it went in.
        record: The teacher's pass over the text.
        adapter_folder: The adapter.
        seed: Of the bootstrap.
        controls: Seed to folder of the random adapters to measure beside it (see `random_controls`).
        fit: The teacher's pass over the text to fit the temperature on; by default half of the documents.
        domain: How far the text is from what the adapter was fitted on, for the record and the verdict.
        on_progress: Told about every batch.
    """
    start = time.monotonic()
    teacher, bootstrap = record.measurement, Bootstrap(len(record.measurement.tokens), seed=seed)

    def with_adapter(folder: Path, name: str) -> Measurement:
        return _measured(source, record, folder, name, on_progress)

    curve = _temperature_curve(source, record, "student", on_progress)
    before = curve.untouched
    fitted = None if fit is None else _temperature_curve(source, fit, "student on calibration text", on_progress)
    after = with_adapter(Path(adapter_folder), "adapter")
    measured = []
    for control_seed, folder in (controls or {}).items():
        control = with_adapter(folder, "control")
        gap = gap_between(before, control, teacher, bootstrap)
        measured.append(Control(control_seed, bootstrap.figures(control), gap))
    gap = gap_between(before, after, teacher, bootstrap)
    temperature = _temperature_control(curve, fitted, after, teacher, seed)
    recalibrated = temperature.gap_closed if temperature else None
    effect = effect_of(
        before,
        after,
        kl_interval=gap.kl_interval,
        ahead_of_temperature=temperature.adapter_ahead if temperature else None,
    )
    control_gap = mean_gap([control.gap_closed for control in measured]) if measured else None
    return Evaluation(
        effect=effect,
        verdict=sentence(
            effect,
            before.figures,
            after.figures,
            kl=(gap.kl, gap.kl_interval),
            cross_entropy=(gap.cross_entropy, gap.cross_entropy_interval),
            control=(control_gap.kl, control_gap.kl_interval) if control_gap else (None, None),
            temperature=(recalibrated.kl, recalibrated.kl_interval) if recalibrated else (None, None),
            other_domain=domain is not None and domain.different,
            aligned=record.aligned.note if record.aligned else None,
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
        domain=domain,
        aligned=record.aligned,
    )


def _measured(
    source: StudentSource,
    record: TeacherRecord,
    adapter: Path | None,
    name: str,
    on_progress: Progress | None,
    readers: Sequence[Reader] = (),
) -> Measurement:
    with source.reading(record.text, adapter, name, on_progress) as (blocks, logits):
        return compare(blocks, logits, record, name, readers)


def _temperature_curve(
    source: StudentSource, record: TeacherRecord, name: str, on_progress: Progress | None
) -> TemperatureCurve:
    """Measure the untouched student, and what it would be at other temperatures, in one pass."""
    reader = TemperatureReader(record.units)
    return reader.curve(_measured(source, record, None, name, on_progress, (reader,)))


def _temperature_control(
    curve: TemperatureCurve, fitted: TemperatureCurve | None, after: Measurement, teacher: Measurement, seed: int
) -> TemperatureControl | None:
    """Fit T on one text, or one half, and measure it on the other; None where a single document leaves no other."""
    if fitted is None:
        fitted_on, (fit, measured) = "half of the text", halves(after.tokens)
        fitted = curve
    else:
        fitted_on, measured = "calibration text", np.arange(len(after.tokens))
        fit = np.arange(len(fitted.untouched.tokens))
    if not len(fit) or not len(measured):
        return None
    temperature = fitted.best(fit)
    bootstrap = Bootstrap(len(measured), seed=seed)
    before, adapted, own = (part.of(measured) for part in (curve.untouched, after, teacher))
    recalibrated = curve.at(temperature).of(measured)
    return TemperatureControl(
        temperature=temperature,
        fitted_on=fitted_on,
        at_edge=not LOWEST * _EDGE < temperature < HIGHEST / _EDGE,
        student=bootstrap.figures(before),
        figures=bootstrap.figures(recalibrated),
        gap_closed=gap_between(before, recalibrated, own, bootstrap),
        adapter_gap_closed=gap_between(before, adapted, own, bootstrap),
        adapter_ahead=bootstrap.kl_fall(recalibrated, adapted),
    )
