"""The front matter of a model card, as the hub defines it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.report import facts
from moe_svd_distill.report.record import EvaluationRecord, RunRecord

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_DATA_SET = "datasets:"
_METRICS = {
    "kl": ("kl_divergence", "KL(teacher ‖ student), nats per token"),
    "cross_entropy": ("cross_entropy", "cross-entropy, nats per token"),
    "perplexity": ("perplexity", "perplexity"),
    "top1_agreement": ("accuracy", "top-1 agreement with the teacher"),
}


def front_matter(record: RunRecord, *, merged: bool = False) -> str:
    """Base model, library, data sets, licence and figures, as far as they are known; no path of a machine.

    Args:
        record: Of the run, with its figures once the adapter has been evaluated.
        merged: Whether the card is of a model that the adapter was merged into.
    """
    from huggingface_hub import ModelCardData

    base = base_model(record).partition("@")[0]
    hub = facts.is_hub_id(base)
    tags = ["distillation", "moe-svd-distill"] if merged else ["lora", "peft", "distillation", "moe-svd-distill"]
    if hub:
        tags.append(f"base_model:{'finetune' if merged else 'adapter'}:{base}")
    results = list(_results(record.evaluation)) if record.evaluation else []
    relation: Mapping[str, Any] = {"base_model_relation": "finetune" if merged else "adapter"} if hub else {}
    data = ModelCardData(
        base_model=base if hub else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        license=_licence(record),
        datasets=_data_sets(record) or None,
        tags=tags,
        model_name=title(record) if results else None,
        eval_results=results or None,
        **relation,
    )
    return f"---\n{data.to_yaml()}\n---"


def base_model(record: RunRecord) -> str:
    """What the adapter is loaded on: the student, or the checkpoint of the hub that a GGUF file was made from."""
    source, named = record.student.source, record.base_model
    return source if source.partition("@")[0] == named or not facts.is_hub_id(named) else named


def title(record: RunRecord) -> str:
    """Student and teacher by their names."""
    return f"{facts.model_name(record, 'student')}, distilled from {facts.model_name(record, 'teacher')}"


def _licence(record: RunRecord) -> str | None:
    """That of both models, if their own cards agree; what follows from two different ones is not for us to say."""
    named = {record.teacher.license, record.student.license}
    return named.pop() if len(named) == 1 else None


def _data_sets(record: RunRecord) -> list[str]:
    """Data sets of the hub that the adapter was made on."""
    sources = (each.get("path") if isinstance(each, Mapping) else each for each in record.recipe.calibration)
    named = [str(source).removeprefix(_DATA_SET) for source in sources if str(source).startswith(_DATA_SET)]
    names = [name.partition("#")[0].partition(":")[0].partition("@")[0] for name in named]
    return [name for name in dict.fromkeys(names) if facts.is_hub_id(name)]


def _results(evaluation: EvaluationRecord) -> Iterator[EvalResult]:
    """What was measured of the student with the adapter."""
    from huggingface_hub import EvalResult

    kind = "text-generation"
    texts = ", ".join(Path(text).name for text in evaluation.texts)
    named = f"held-out text{f' ({texts})' if texts else ''}"
    adapted = evaluation.on_text.adapted if evaluation.on_text else None
    for field, (metric, words) in _METRICS.items():
        if adapted and math.isfinite(value := getattr(adapted, field)):
            yield EvalResult(kind, "held-out-text", named, metric, round(value, 6), metric_name=words)
    for score in evaluation.benchmarks.scores if evaluation.benchmarks else ():
        if math.isfinite(score.adapted):
            yield EvalResult(kind, score.task, score.task, score.metric, score.adapted)
    for name, found in evaluation.code_benchmarks.items():
        if math.isfinite(found.adapted.pass_at_1):
            own = "openai/openai_humaneval" if name == "humaneval" else "programming-problems"
            yield EvalResult(kind, own, Path(name).name, "pass@1", found.adapted.pass_at_1)
