"""Evaluate a finished adapter on held-out text and on benchmarks, and keep the figures beside it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from moe_svd_distill.adapter.adapter_file import read_json, sha256_of
from moe_svd_distill.checkpoints.hub import say_once
from moe_svd_distill.errors import UsageError
from moe_svd_distill.evaluation.code.problems import ProblemSet, load_problems
from moe_svd_distill.evaluation.request import BenchmarkRequest, EvaluationOptions, EvaluationRequest, Progress
from moe_svd_distill.execution.events import Event, Measured, Noted
from moe_svd_distill.files.names import (
    ADAPTER_FILE,
    CARD_FILE,
    EVALUATION_FILE,
    REPORT_FILE,
)
from moe_svd_distill.files.typed import as_json, read_as
from moe_svd_distill.files.writing import write_json, write_text
from moe_svd_distill.pipeline.pair import open_model, open_pair
from moe_svd_distill.pipeline.placement import devices_here
from moe_svd_distill.pipeline.record import base_model
from moe_svd_distill.pipeline.texts import longest_sequence
from moe_svd_distill.pipeline.tracked_figures import evaluation_figures
from moe_svd_distill.recipe import text_sources
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.html import html_report
from moe_svd_distill.report.record import EvaluationRecord, LeftOut, RecipeRecord, RunRecord
from moe_svd_distill.tracking import require_trackers, tracked

if TYPE_CHECKING:
    from moe_svd_distill.calibration.documents import Document
    from moe_svd_distill.calibration.paired import VocabularyMode
    from moe_svd_distill.evaluation.scale_search import ScaleDecision

MOSTLY = 0.5
ASKED = ("tokens", "length", "seed", "controls", "vocabulary", "dtype")
"""Of a request, what its figures depend on beside the adapter, the models and the text."""
SAME_SOURCES = (
    "The text is of the sources the adapter was made on, so the gain shown may be larger than on other sources: name "
    "text of others."
)


@dataclass(frozen=True, repr=False)
class EvaluatedAdapter:
    """The figures of an adapter and where its report lies."""

    evaluation: EvaluationRecord
    report: Path | None

    def __repr__(self) -> str:
        return f"EvaluatedAdapter({self.evaluation.verdict or 'benchmarks alone'!r})"


def evaluate(
    adapter: Path | str,
    texts: Iterable[Path | str] = (),
    on_progress: Progress | None = None,
    **options: Unpack[EvaluationOptions],
) -> EvaluatedAdapter:
    """Measure teacher, untouched student, adapter and controls on text, and run benchmarks.

    Documents the adapter was made on are left out, and what mostly repeats them, and so are others of the same sources,
    unless nothing else is left: then the verdict says so. The figures are written to evaluation.json, and into
    README.md and report.html where the folder holds the record of a run. Text or benchmarks alone leave the figures
    that an earlier evaluation of the same adapter has of the other.

    Args:
        adapter: Its folder.
        texts: Held-out text: files and folders.
        on_progress: Told how it goes.
        options: Further fields of an `EvaluationRequest`, such as ``tokens``, ``dtype`` and ``benchmarks``.

    Raises:
        DistillError: One of its kinds, each with its exit code.
    """
    request = EvaluationRequest(Path(adapter), texts=tuple(map(Path, texts)), **options)
    folder, benchmarks = request.adapter, request.benchmarks
    if not request.texts and not benchmarks:
        raise UsageError("no text to evaluate on", "Give --text FILE")
    require_trackers(request.report_to or ())
    problems = _problems(benchmarks) if benchmarks else ()
    record = RunRecord.in_folder(folder)
    student = request.student or record.student.source or base_model(folder)
    teacher = request.teacher or record.teacher.source
    if not teacher and (request.texts or (benchmarks and benchmarks.teacher)):
        raise UsageError(f"{folder} does not say which teacher it came from", "Give --teacher")
    devices_here([request.device])
    request = replace(request, teacher=teacher, student=student)
    digest = sha256_of(folder / ADAPTER_FILE) if (folder / ADAPTER_FILE).is_file() else None
    figures = dict(_kept(folder, digest, bool(request.texts), bool(benchmarks and benchmarks.harness)))
    if request.texts:
        figures |= _text_figures(request, record, on_progress)
    if benchmarks and benchmarks.harness:
        figures["benchmarks"] = _benchmarks(request, on_progress)
    if problems:
        found = _code_benchmarks(request, problems, on_progress)
        earlier = figures.get("code_benchmarks")
        figures["code_benchmarks"] = {**earlier, **found} if isinstance(earlier, Mapping) else found
    figures["adapter_sha256"] = digest
    write_json(folder / EVALUATION_FILE, figures)
    evaluation = read_as(EvaluationRecord, figures)
    trackers = record.recipe.report_to if request.report_to is None else request.report_to
    with tracked(trackers, folder, _note) as tell:
        tell(Measured("evaluation", evaluation_figures(figures)))
    if not record.content:
        return EvaluatedAdapter(evaluation, None)
    complete = replace(record, evaluation=evaluation)
    write_text(folder / CARD_FILE, adapter_card(complete))
    write_text(folder / REPORT_FILE, html_report(complete))
    return EvaluatedAdapter(evaluation, folder / REPORT_FILE)


def _note(event: Event) -> None:
    if isinstance(event, Noted):
        say_once(event.text)


def held_out(
    documents: Sequence[Document], search: ScaleDecision, calibration: Sequence[Document]
) -> tuple[tuple[Document, ...], LeftOut]:
    """Leave out of a text what an adapter was made on; what is left, and what was left out.

    Args:
        documents: The text.
        search: Of the adapter's run, which names the documents and groups that were used.
        calibration: The text the adapter was made of, as far as it is here.
    """
    from moe_svd_distill.calibration.documents import without, without_groups

    used: Collection[str] = set(search.used_documents)
    fresh = without(documents, used)
    seen = [document for document in calibration if document.identity in used or document.digest in used]
    new = _not_repeated(fresh, seen) if seen else fresh
    others = without_groups(new, set(search.used_groups))
    left_out = LeftOut(
        documents_used=len(documents) - len(fresh),
        documents_of_used_groups=len(new) - len(others) if others else 0,
        documents_repeated=len(fresh) - len(new) if seen else None,
        groups_apart=bool(others) or not new,
    )
    return others or new, left_out


def _not_repeated(documents: Sequence[Document], seen: Sequence[Document]) -> tuple[Document, ...]:
    from moe_svd_distill.calibration.documents import cut_long_documents
    from moe_svd_distill.calibration.repeats import Repeats

    repeats = Repeats()
    for document in cut_long_documents(seen, minimum=0):
        repeats.fresh(document)
    return tuple(document for document in documents if repeats.repeated_share(document.text) <= MOSTLY)


def _problems(request: BenchmarkRequest) -> tuple[ProblemSet, ...]:
    """Refuse what cannot be run before anything is measured; the programming problems."""
    if request.harness:
        from moe_svd_distill.evaluation.benchmarks import require_harness

        require_harness()
    if request.code and not request.run_generated_code:
        raise UsageError(
            f"{request.code[0]} runs programs that the models write (found no consent to that)",
            "Add --run-generated-code",
        )
    return tuple(load_problems(name, request.limit) for name in request.code)


def _kept(folder: Path, digest: str | None, texts: bool, harness: bool) -> Mapping[str, object]:
    """What an earlier evaluation of the same bytes found and this one does not find anew."""
    earlier = read_json(folder / EVALUATION_FILE) if (folder / EVALUATION_FILE).is_file() else {}
    if digest is None or earlier.get("adapter_sha256") != digest:
        return {}
    dropped = {"benchmarks"} if harness else set()
    if texts:
        dropped |= earlier.keys() - {"benchmarks", "code_benchmarks"}
    return {key: value for key, value in earlier.items() if key not in dropped}


def _text_figures(request: EvaluationRequest, record: RunRecord, on_progress: Progress | None) -> dict[str, object]:
    from moe_svd_distill.calibration.reading import enough_characters, read_text
    from moe_svd_distill.evaluation.evaluate import evaluate as evaluate_on_text

    told = on_progress or (lambda name, done, total: None)
    recipe = record.recipe
    told("reading the texts", 0, 0)
    calibration = _calibration(recipe)
    read = read_text(request.texts, group_field=recipe.text_group, limit_characters=enough_characters(request.tokens))
    chosen, left_out = held_out(read.documents, record.scale_search, calibration)
    asked: VocabularyMode = "shared" if recipe.vocabulary == "shared" else "equal"
    assert request.teacher
    assert request.student
    told("opening the models", 0, 0)
    with open_pair(request.teacher, request.student, on_download=on_progress) as pair:
        length = min(request.length, longest_sequence(pair))
        settled = replace(request, length=length, vocabulary=request.vocabulary or asked)
        folders = pair.teacher.checkpoint.folder, pair.student.checkpoint.folder
        result = evaluate_on_text(settled, *folders, chosen, calibration, _reading(told))
        notes = (*read.notes, *few_sources(chosen), *pair.tokenizer_notes)
        found = replace(left_out, read=read.counts, notes=notes)
    asked_again = {name: getattr(request, name) for name in ASKED}
    figures = result.as_dict() | {"texts": [str(path) for path in request.texts], "held_out": as_json(found)}
    figures["asked"] = asked_again
    if not found.groups_apart:
        figures["verdict"] = f"{figures['verdict']} {SAME_SOURCES}"
    return figures


def few_sources(documents: Sequence[Document]) -> Iterator[str]:
    """What intervals do not tell where many sections are of few sources."""
    from moe_svd_distill.calibration.text import FEWEST_DOCUMENTS

    sources = len({document.group_digest for document in documents})
    if sources < min(FEWEST_DOCUMENTS, len(documents)):
        named = f"{sources} source{'s' * (sources > 1)}"
        yield f"{len(documents)} documents or sections of {named}: the intervals say nothing of other sources"


def _reading(on_progress: Progress) -> Progress:
    return lambda name, done, total: on_progress(f"reading: {name}", done, total)


def _calibration(recipe: RecipeRecord) -> Sequence[Document]:
    """The text the adapter was calibrated on, where the run names files that are still here; else nothing."""
    from moe_svd_distill.calibration.sources import read_sources

    try:
        sources = text_sources(recipe.calibration)
    except ValueError:  # of another version
        return ()
    if not sources or not all(Path(source.path).exists() for source in sources):
        return ()
    tokens = max(recipe.tokens or 0, recipe.scale_search_tokens or 0)
    return read_sources(sources, field=recipe.text_field, group_field=recipe.text_group, tokens=tokens).documents


def _benchmarks(request: EvaluationRequest, on_progress: Progress | None) -> dict[str, object]:
    from moe_svd_distill.evaluation.benchmarks import run_benchmarks

    assert request.student
    checkpoint = open_model(request.student, on_download=on_progress).checkpoint
    checkpoint.close()
    if checkpoint.is_gguf:
        raise UsageError(
            f"the harness loads its models itself, and {request.student} is a GGUF file",
            "Give --student the checkpoint that the file was made from",
        )
    return as_json(run_benchmarks(request, checkpoint.folder, on_progress))


def _code_benchmarks(
    request: EvaluationRequest, problems: Sequence[ProblemSet], on_progress: Progress | None
) -> dict[str, object]:
    from moe_svd_distill.evaluation.code.benchmark import LocalModel, run_code_benchmark

    def local(source: str | None) -> LocalModel:
        assert source
        checkpoint = open_model(source, on_download=on_progress).checkpoint
        try:
            return LocalModel(checkpoint.folder, checkpoint.cache_key())
        finally:
            checkpoint.close()

    teacher = local(request.teacher) if request.benchmarks and request.benchmarks.teacher else None
    results = [run_code_benchmark(request, each, local(request.student), teacher, on_progress) for each in problems]
    return {result.name: as_json(result) for result in results}
