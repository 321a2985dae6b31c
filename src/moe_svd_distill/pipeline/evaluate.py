"""Evaluate a finished adapter on held-out text and on benchmarks, and keep the figures beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.adapter.digest import sha256_of
from moe_svd_distill.errors import UsageError
from moe_svd_distill.evaluation.code.problems import ProblemSet, is_code_benchmark, load_problems
from moe_svd_distill.files.names import (
    ADAPTER_FILE,
    CARD_FILE,
    EVALUATION_FILE,
    REPORT_FILE,
)
from moe_svd_distill.files.writing import write_json, write_text
from moe_svd_distill.pipeline.held_out import SAME_SOURCES, held_out
from moe_svd_distill.pipeline.pair import open_model, open_pair
from moe_svd_distill.pipeline.record import base_model
from moe_svd_distill.pipeline.texts import longest_sequence
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.html import html_report
from moe_svd_distill.report.record import RecipeRecord, RunRecord

if TYPE_CHECKING:
    from moe_svd_distill.calibration.paired import VocabularyMode
    from moe_svd_distill.calibration.text import Document
    from moe_svd_distill.evaluation.sources import Mode


@dataclass(frozen=True)
class EvaluatedAdapter:
    """The figures of an adapter and where its report lies."""

    evaluation: dict[str, Any]
    report: Path | None


@dataclass(frozen=True)
class BenchmarkRequest:
    """Which benchmarks to run.

    Attributes:
        tasks: `humaneval` and `humaneval:FILE`, programming problems; other names are the lm-evaluation-harness's.
        limit: Examples of each task at most.
        include_path: Folder with task files of one's own for the harness.
        run_generated_code: Whether programs that the models write may be run; programming problems need it.
        new_tokens: Tokens of each program at most.
        batch: Programs that are written at a time.
        teacher: Whether the teacher is given the programming problems as well.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    include_path: Path | None = None
    run_generated_code: bool = False
    new_tokens: int = 384
    batch: int = 32
    teacher: bool = False

    @property
    def code(self) -> tuple[str, ...]:
        """The tasks that are programming problems."""
        return tuple(task for task in self.tasks if is_code_benchmark(task))

    @property
    def harness(self) -> tuple[str, ...]:
        """The tasks of the lm-evaluation-harness."""
        return tuple(task for task in self.tasks if not is_code_benchmark(task))


def evaluate_adapter(
    folder: Path,
    teacher: str | None,
    student: str | None,
    texts: Sequence[Path],
    *,
    tokens: int = 50_000,
    seed: int = 0,
    device: str = "cpu",
    controls: int = 1,
    mode: Mode = "auto",
    cache: Path | None = None,
    vocabulary: VocabularyMode | None = None,
    benchmarks: BenchmarkRequest | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> EvaluatedAdapter:
    """Measure teacher, untouched student, adapter and controls on text, and run benchmarks.

    Documents the adapter was made on are left out, and so are others of the same sources, unless nothing else is left:
    then the verdict says so. The figures are written to evaluation.json, and into README.md and
    report.html where the folder holds the record of a run. Text or benchmarks alone leave the figures that an earlier
    evaluation of the same adapter has of the other.

    Args:
        folder: The adapter.
        teacher: The teacher; default: the one in run.json.
        student: The student; default: the one in run.json or adapter_config.json.
        texts: Held-out text.
        tokens: Tokens to read at most.
        seed: Of the order of documents and the control.
        device: Where the models run.
        controls: Random deltas to measure.
        mode: Whether the models are held in memory.
        cache: Where streamed states and written programs lie; default: `cache` in the adapter's folder.
        vocabulary: Whether the models must number their tokens alike; default: what the run asked for, else `equal`.
        benchmarks: Benchmarks to run.
        on_progress: Told the pass, and how much of how much is done.
        on_stage: Told what has no count.

    Raises:
        DistillError: One of its kinds, each with its exit code.
    """
    if not texts and not benchmarks:
        raise UsageError("no text to evaluate on", "Give --text FILE")
    problems = _check(benchmarks) if benchmarks else ()
    record = RunRecord.in_folder(folder)
    student = student or record.student.source or base_model(folder)
    teacher = teacher or record.teacher.source
    if not teacher and (texts or (benchmarks and benchmarks.teacher)):
        raise UsageError(f"{folder} does not say which teacher it came from", "Give --teacher")
    digest = sha256_of(folder / ADAPTER_FILE) if (folder / ADAPTER_FILE).is_file() else None
    figures = _kept(folder, digest, bool(texts), bool(benchmarks and benchmarks.harness))
    if texts:
        from moe_svd_distill.calibration.text import read_documents
        from moe_svd_distill.evaluation.evaluate import evaluate

        assert teacher
        calibration = _calibration(record.recipe)
        documents = read_documents(texts, group_field=record.recipe.text_group)
        chosen = held_out(documents, record.scale_search, calibration)
        with open_pair(teacher, student) as pair:
            result = evaluate(
                folder,
                pair.teacher.checkpoint.folder,
                pair.student.checkpoint.folder,
                chosen.documents,
                limit_tokens=tokens,
                length=longest_sequence(pair),
                seed=seed,
                controls=controls,
                calibration=calibration,
                device=device,
                mode=mode,
                cache=cache,
                vocabulary=vocabulary or ("shared" if record.recipe.vocabulary == "shared" else "equal"),
                on_progress=_reading(on_progress) if on_progress else None,
            )
        figures |= result.as_dict() | {"texts": [str(path) for path in texts], "held_out": chosen.as_dict()}
        if not chosen.apart:
            figures["verdict"] = f"{figures['verdict']} {SAME_SOURCES}"
    if benchmarks and benchmarks.harness:
        figures["benchmarks"] = _benchmarks(folder, student, benchmarks, device, seed, on_stage)
    if benchmarks and problems:
        asked = teacher if benchmarks.teacher else None
        kept = cache or folder / "cache"
        found = _code_benchmarks(folder, student, asked, problems, benchmarks, kept, device, on_progress)
        figures["code_benchmarks"] = {**figures.get("code_benchmarks", {}), **found}
    figures["adapter_sha256"] = digest
    write_json(folder / EVALUATION_FILE, figures)
    if not record.content:
        return EvaluatedAdapter(figures, None)
    complete = RunRecord.of(record.content, figures)
    write_text(folder / CARD_FILE, adapter_card(complete))
    write_text(folder / REPORT_FILE, html_report(complete))
    return EvaluatedAdapter(figures, folder / REPORT_FILE)


def _check(request: BenchmarkRequest) -> tuple[ProblemSet, ...]:
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


def _kept(folder: Path, digest: str | None, texts: bool, harness: bool) -> dict[str, Any]:
    """What an earlier evaluation of the same bytes found and this one does not find anew."""
    earlier = read_json(folder / EVALUATION_FILE) if (folder / EVALUATION_FILE).is_file() else {}
    if digest is None or earlier.get("adapter_sha256") != digest:
        return {}
    dropped = {"benchmarks"} if harness else set()
    if texts:
        dropped |= earlier.keys() - {"benchmarks", "code_benchmarks"}
    return {key: value for key, value in earlier.items() if key not in dropped}


def _reading(on_progress: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    return lambda name, done, total: on_progress(f"reading: {name}", done, total)


def _calibration(recipe: RecipeRecord) -> Sequence[Document]:
    """The text the adapter was calibrated on, where the run names files that are still here; else nothing."""
    from moe_svd_distill.calibration.text import read_documents

    paths = [Path(path).expanduser() for path in recipe.calibration]
    if not paths or not all(path.exists() for path in paths):
        return ()
    return read_documents(paths, field=recipe.text_field, group_field=recipe.text_group)


def _benchmarks(
    folder: Path,
    student: str,
    request: BenchmarkRequest,
    device: str,
    seed: int,
    on_stage: Callable[[str], None] | None,
) -> dict[str, Any]:
    from moe_svd_distill.evaluation.benchmarks import run_benchmarks

    model = open_model(student)
    student_folder = model.checkpoint.folder
    model.checkpoint.close()
    return run_benchmarks(
        folder,
        student_folder,
        request.harness,
        limit=request.limit,
        include_path=request.include_path,
        device=device,
        seed=seed,
        on_stage=on_stage,
    ).as_dict()


def _code_benchmarks(
    folder: Path,
    student: str,
    teacher: str | None,
    problems: Sequence[ProblemSet],
    request: BenchmarkRequest,
    kept: Path,
    device: str,
    on_progress: Callable[[str, int, int], None] | None,
) -> dict[str, Any]:
    from moe_svd_distill.evaluation.code.benchmark import LocalModel, run_code_benchmark

    def local(source: str) -> LocalModel:
        checkpoint = open_model(source).checkpoint
        try:
            return LocalModel(checkpoint.folder, checkpoint.fingerprint())
        finally:
            checkpoint.close()

    results = [
        run_code_benchmark(
            each,
            local(student),
            folder,
            kept,
            teacher=local(teacher) if teacher else None,
            limit=request.new_tokens,
            batch=request.batch,
            device=device,
            on_progress=on_progress,
        )
        for each in problems
    ]
    return {result.name: result.as_dict() for result in results}
