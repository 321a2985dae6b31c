"""Evaluate a finished adapter on held-out text and on benchmarks, and keep the figures beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter.adapter_file import ADAPTER_FILE, read_json
from moe_svd_distill.adapter.digest import sha256_of
from moe_svd_distill.errors import MissingInputError, UsageError
from moe_svd_distill.execution.publish import write_json_atomic, write_text_atomic
from moe_svd_distill.pipeline.held_out import SAME_SOURCES, held_out
from moe_svd_distill.pipeline.pair import open_model, open_pair
from moe_svd_distill.pipeline.texts import longest_sequence
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.html import html_report

if TYPE_CHECKING:
    from moe_svd_distill.calibration.paired import VocabularyMode
    from moe_svd_distill.calibration.text import Document
    from moe_svd_distill.evaluation.sources import Mode

EVALUATION = "evaluation.json"
REPORT = "report.html"


@dataclass(frozen=True)
class EvaluatedAdapter:
    """The figures of an adapter and where its report lies."""

    evaluation: dict[str, Any]
    report: Path | None


@dataclass(frozen=True)
class BenchmarkRequest:
    """What to run of the lm-evaluation-harness.

    Attributes:
        tasks: Names of tasks.
        limit: Examples of each task at most.
        include_path: Folder with task files of one's own.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    include_path: Path | None = None


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
        cache: Where streamed states lie; default: `cache` in the adapter's folder.
        vocabulary: Whether the models must number their tokens alike; default: what the run asked for, else `equal`.
        benchmarks: Tasks of the lm-evaluation-harness to run.
        on_progress: Told the pass, tokens done and tokens to do.
        on_stage: Told what has no count.

    Raises:
        DistillError: One of its kinds, each with its exit code.
    """
    if not texts and not benchmarks:
        raise UsageError("no text to evaluate on", "Give --text FILE")
    if benchmarks:
        from moe_svd_distill.evaluation.benchmarks import require_harness

        require_harness()
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    student = student or record.get("student", {}).get("source") or _base_model(folder)
    digest = sha256_of(folder / ADAPTER_FILE) if (folder / ADAPTER_FILE).is_file() else None
    figures = _kept(folder, digest, drop="text" if texts else "benchmarks")
    if texts:
        from moe_svd_distill.calibration.text import read_documents
        from moe_svd_distill.evaluation.evaluate import evaluate

        teacher = teacher or record.get("teacher", {}).get("source")
        if not teacher:
            raise UsageError(f"{folder} does not say which teacher it came from", "Give --teacher")
        search, calibration = record.get("scale_search", {}), _calibration(record)
        chosen = held_out(read_documents(texts, group_field=_asked(record, "text_group")), search, calibration)
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
                vocabulary=vocabulary or _vocabulary(record),
                on_progress=on_progress,
            )
        figures |= result.as_dict() | {"texts": [str(path) for path in texts], "held_out": chosen.as_dict()}
        if not chosen.apart:
            figures["verdict"] = f"{figures['verdict']} {SAME_SOURCES}"
    if benchmarks:
        figures["benchmarks"] = _benchmarks(folder, student, benchmarks, device, seed, on_stage)
    figures["adapter_sha256"] = digest
    write_json_atomic(folder / EVALUATION, figures)
    if not record:
        return EvaluatedAdapter(figures, None)
    complete = {**record, "evaluation": figures}
    write_text_atomic(folder / "README.md", adapter_card(complete))
    write_text_atomic(folder / REPORT, html_report(complete))
    return EvaluatedAdapter(figures, folder / REPORT)


def _kept(folder: Path, digest: str | None, drop: str) -> dict[str, Any]:
    """What an earlier evaluation of the same bytes found and this one does not find anew."""
    earlier = read_json(folder / EVALUATION) if (folder / EVALUATION).is_file() else {}
    if digest is None or earlier.get("adapter_sha256") != digest:
        return {}
    if drop == "text":
        return {key: value for key, value in earlier.items() if key == "benchmarks"}
    return {key: value for key, value in earlier.items() if key != "benchmarks"}


def _vocabulary(record: Mapping[str, Any]) -> VocabularyMode:
    return "shared" if _asked(record, "vocabulary") == "shared" else "equal"


def _asked(record: Mapping[str, Any], key: str) -> Any:
    """What the recipe of the run says, if there was one."""
    return (record.get("recipe") or {}).get(key)


def _calibration(record: Mapping[str, Any]) -> Sequence[Document]:
    """The text the adapter was calibrated on, where the run names files that are still here; else nothing."""
    from moe_svd_distill.calibration.text import read_documents

    paths = [Path(str(path)).expanduser() for path in _asked(record, "calibration") or ()]
    if not paths or not all(path.exists() for path in paths):
        return ()
    return read_documents(paths, field=_asked(record, "text_field"), group_field=_asked(record, "text_group"))


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
        request.tasks,
        limit=request.limit,
        include_path=request.include_path,
        device=device,
        seed=seed,
        on_stage=on_stage,
    ).as_dict()


def _base_model(folder: Path) -> str:
    configuration = folder / "adapter_config.json"
    if not configuration.is_file():
        raise MissingInputError(f"{folder} holds no adapter (no adapter_config.json)", "Give an adapter's folder")
    base = read_json(configuration).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{configuration} names no base model", "Give --student")
    return str(base)
