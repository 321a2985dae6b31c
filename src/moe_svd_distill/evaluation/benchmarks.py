"""Benchmarks of the lm-evaluation-harness on the student, untouched and with the adapter, side by side.

The harness is an optional extra. It loads both models its own way (`model="hf"`, and PEFT for the adapter), which makes
its figures independent of everything else here. Nothing of a model's folder is run as code.
"""

from __future__ import annotations

import contextlib
import gc
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.errors import BadDataError, MissingInputError, UsageError, reason_of
from moe_svd_distill.evaluation.loading import default_dtype, dtype_name, require_memory
from moe_svd_distill.evaluation.request import BenchmarkRequest, EvaluationRequest, Progress
from moe_svd_distill.evaluation.result import Benchmarks, Score

EXTRA = "moe-svd-distill[benchmarks]"
OLDEST = (0, 4, 10)  # older ones ask transformers for AutoModelForVision2Seq, which version 5 does not have
_BATCH = 8


def run_benchmarks(
    request: EvaluationRequest, student_folder: str | Path, on_progress: Progress | None = None
) -> Benchmarks:
    """Run tasks of the lm-evaluation-harness on the student with and without the adapter.

    Args:
        request: Its adapter, benchmarks, device and seed.
        student_folder: Local folder of the student, with its tokenizer.
        on_progress: Told which model is next.

    Raises:
        MissingInputError: The harness is not installed, or the folder of tasks is not there.
        UsageError: No task is named or one is not known, or the student does not fit in memory.
        BadDataError: PEFT would not load the adapter whole, or the harness fails.
    """
    harness = require_harness()
    asked, device = request.benchmarks, request.device
    if asked is None or not asked.harness:
        raise UsageError("no benchmark is named", "Give --benchmark TASK")
    if asked.include_path is not None and not Path(asked.include_path).is_dir():
        raise MissingInputError(f"{asked.include_path} is not a folder", "Give the folder that holds the task files")
    # The harness takes PEFT's word for it, and PEFT drops keys that it does not recognise.
    check_loads(request.adapter, student_folder)
    torch_dtype = request.torch_dtype or default_dtype(device)
    dtype = dtype_name(torch_dtype)
    require_memory(Path(student_folder), device, torch_dtype)
    with _quiet_output():
        manager = _task_manager(asked)
        results = []
        for name, peft in (("student", None), ("adapter", str(request.adapter))):
            if on_progress:
                on_progress(f"benchmarks: {name}", 0, 0)
            arguments = {"pretrained": str(student_folder), "dtype": dtype, "trust_remote_code": False}
            arguments |= {"peft": peft} if peft else {}
            results.append(_run(arguments, request, asked, manager))
            gc.collect()
    before, after = results
    return Benchmarks(
        scores=tuple(_scores(before, after)),
        tasks={
            task: {"version": before["versions"].get(task), "examples_in_prompt": before["n-shot"].get(task)}
            for task in before["results"]
        },
        limit=asked.limit,
        dtype=dtype,
        harness=harness,
    )


def require_harness() -> str:
    """The version of lm-eval, or a refusal that names the extra to install.

    Raises:
        MissingInputError: It is not installed, or too old to run with transformers 5.
    """
    try:
        found = version("lm-eval")
    except PackageNotFoundError:
        found = "none"
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    if numbers < OLDEST:
        raise MissingInputError(
            f"benchmarks need the lm-evaluation-harness (found lm-eval {found}, expected at least "
            f"{'.'.join(map(str, OLDEST))})",
            f"Install the extra: pip install '{EXTRA}'",
        )
    return found


def _task_manager(asked: BenchmarkRequest) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if asked.include_path is None else str(asked.include_path))
    unknown = [task for task in asked.harness if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(
            f"the lm-evaluation-harness knows no task {', '.join(unknown)}",
            "See `lm_eval ls tasks`, or give --benchmark-include-path",
        )
    return manager


def _run(
    arguments: Mapping[str, Any], request: EvaluationRequest, asked: BenchmarkRequest, manager: Any
) -> Mapping[str, Any]:
    import lm_eval

    seed = request.seed
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=dict(arguments),
            tasks=list(asked.harness),
            task_manager=manager,
            device=request.device,
            batch_size=_BATCH,
            limit=asked.limit,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:  # tasks bring their own data and code, and fail in their own ways
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise BadDataError(
            f"the lm-evaluation-harness failed on {', '.join(asked.harness)} ({reason[:300]})",
            "Try the task with lm_eval itself",
        ) from error
    if not found or not found.get("results"):
        raise BadDataError(f"the lm-evaluation-harness gave no result for {', '.join(asked.harness)}", "Check the task")
    return found


def _scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Score]:
    scores = []
    for task, values in before["results"].items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error_key, adapted = f"{metric}_stderr,{name}", after["results"][task]
            scores.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=name,
                    higher_is_better=before.get("higher_is_better", {}).get(task, {}).get(metric),
                    examples=(before.get("n-samples", {}).get(task) or {}).get("effective"),
                    student=float(value),
                    student_error=_number(values.get(error_key)),
                    adapted=float(adapted[key]),
                    adapted_error=_number(adapted.get(error_key)),
                    change=float(adapted[key]) - float(value),
                    change_error=_paired_error(before, after, task, metric, name, float(adapted[key]) - float(value)),
                )
            )
    return scores


def _paired_error(
    before: Mapping[str, Any], after: Mapping[str, Any], task: str, metric: str, name: str, change: float
) -> float | None:
    """Standard error of a mean of differences over the same examples, where the metric is a mean of examples."""
    values = []
    for side in (before, after):
        samples = [sample for sample in side.get("samples", {}).get(task, ()) if sample.get("filter", name) == name]
        values.append({sample["doc_id"]: sample.get(metric) for sample in samples})
    first, second = values
    numbers = [*first.values(), *second.values()]
    if len(first) < 2 or first.keys() != second.keys():
        return None
    if not all(isinstance(value, int | float | np.number) for value in numbers):
        return None
    differences = np.array([float(second[example]) - float(first[example]) for example in first])
    if not np.isclose(differences.mean(), change, atol=1e-9):
        return None
    return float(differences.std(ddof=1) / np.sqrt(len(differences)))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


@contextlib.contextmanager
def _quiet_output() -> Any:
    """Standard output is the command's own; what the harness prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
