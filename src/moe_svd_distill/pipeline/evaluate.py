"""Evaluate a finished adapter on held-out text and keep the figures beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_svd_distill.adapter.adapter_file import read_json
from moe_svd_distill.errors import MissingInputError, UsageError
from moe_svd_distill.execution.publish import write_json_atomic, write_text_atomic
from moe_svd_distill.pipeline.pair import open_pair
from moe_svd_distill.pipeline.scale import sequence_length
from moe_svd_distill.report.card import adapter_card
from moe_svd_distill.report.html import html_report

EVALUATION = "evaluation.json"
REPORT = "report.html"


@dataclass(frozen=True)
class EvaluatedAdapter:
    """The figures of an adapter and where its report lies."""

    evaluation: dict[str, Any]
    report: Path | None


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
    on_progress: Callable[[str, int, int], None] | None = None,
) -> EvaluatedAdapter:
    """Measure teacher, untouched student, adapter and a random delta of equal norm on text.

    Text that the scale was searched on is left out. The figures are written to evaluation.json, and into README.md and
    report.html where the folder holds the record of a run.

    Args:
        folder: The adapter.
        teacher: The teacher; default: the one in run.json.
        student: The student; default: the one in run.json or adapter_config.json.
        texts: Held-out text.
        tokens: Tokens to read at most.
        seed: Of the order of documents and the control.
        device: Where the models run.
        controls: Random deltas to measure.
        on_progress: Told the pass, tokens done and tokens to do.

    Raises:
        DistillError: One of its kinds, each with its exit code.
    """
    from moe_svd_distill.calibration.text import read_documents
    from moe_svd_distill.evaluation.evaluate import evaluate

    if not texts:
        raise UsageError("no text to evaluate on", "Give --text FILE")
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    teacher = teacher or record.get("teacher", {}).get("source")
    student = student or record.get("student", {}).get("source") or _base_model(folder)
    if not teacher:
        raise UsageError(f"{folder} does not say which teacher it came from", "Give --teacher")
    used = record.get("scale_search", {}).get("used_documents", ())
    with open_pair(teacher, student) as pair:
        result = evaluate(
            folder,
            pair.teacher.checkpoint.folder,
            pair.student.checkpoint.folder,
            read_documents(texts),
            limit_tokens=tokens,
            length=sequence_length(pair),
            seed=seed,
            controls=controls,
            used=used,
            device=device,
            on_progress=on_progress,
        )
    figures = {**result.as_dict(), "texts": [str(path) for path in texts], "left_out_documents": len(used)}
    write_json_atomic(folder / EVALUATION, figures)
    if not record:
        return EvaluatedAdapter(figures, None)
    complete = {**record, "evaluation": figures}
    write_text_atomic(folder / "README.md", adapter_card(complete))
    write_text_atomic(folder / REPORT, html_report(complete))
    return EvaluatedAdapter(figures, folder / REPORT)


def _base_model(folder: Path) -> str:
    configuration = folder / "adapter_config.json"
    if not configuration.is_file():
        raise MissingInputError(f"{folder} holds no adapter (no adapter_config.json)", "Give an adapter's folder")
    base = read_json(configuration).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{configuration} names no base model", "Give --student")
    return str(base)
