"""pass@1 of the student, untouched and with the adapter, over programming problems, with what was gained and lost."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_svd_distill.adapter.adapter_file import sha256_of
from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.calibration.tokenizer import auto_tokenizer
from moe_svd_distill.evaluation.code.paired import paired_change
from moe_svd_distill.evaluation.code.problems import ProblemSet
from moe_svd_distill.evaluation.code.result import CodeBenchmark, Solved, WritingSettings
from moe_svd_distill.evaluation.code.sandbox import Limits, guards, run_program
from moe_svd_distill.evaluation.code.writing import CompletionFile, Continuation, complete
from moe_svd_distill.evaluation.loading import dtype_name, fastest_dtype, load_model
from moe_svd_distill.evaluation.request import EvaluationRequest, Progress
from moe_svd_distill.files.names import ADAPTER_FILE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LocalModel:
    """A model in a folder.

    Attributes:
        folder: With weights and tokenizer.
        key: Of its checkpoint (`cache_key`).
    """

    folder: Path
    key: str


def run_code_benchmark(
    request: EvaluationRequest,
    problems: ProblemSet,
    student: LocalModel,
    teacher: LocalModel | None = None,
    on_progress: Progress | None = None,
) -> CodeBenchmark:
    """Let the models complete the problems, and run what they wrote. Only for users who asked for that.

    Args:
        request: Its adapter, how programs are written, the device, and where they are kept: those that are there are
            not written again.
        problems: From `load_problems`.
        student: Untouched.
        teacher: Measured as well where it is given.
        on_progress: Told the step, problems done and problems to do.

    Raises:
        MissingInputError: A model or its tokenizer is not there.
        BadDataError: PEFT would not load the adapter whole, or programs cannot be limited.
        UsageError: A model does not fit in memory.
    """
    assert request.benchmarks
    adapter_folder, device = request.adapter, request.device
    dtype = request.torch_dtype or fastest_dtype(device)
    check_loads(adapter_folder, student.folder)
    settings = WritingSettings(
        limit=request.benchmarks.new_tokens,
        batch=request.benchmarks.batch,
        dtype=dtype_name(dtype),
        device=device.partition(":")[0],
    )
    run = _Run(problems, settings, request.cache_folder, on_progress)
    loaded = _Loaded(student.folder, device, dtype)
    before = run.solve("student", student, None, lambda: loaded.untouched)
    after = run.solve(
        "adapted", student, sha256_of(adapter_folder / ADAPTER_FILE), lambda: loaded.adapted(adapter_folder)
    )
    above = None
    if teacher:
        del loaded  # its memory is the teacher's
        gc.collect()
        above = run.solve("teacher", teacher, None, lambda: _Loaded(teacher.folder, device, dtype).untouched)
    names = [problem.task_id for problem in problems.problems]
    gained = tuple(name for name in names if name in after.passed and name not in before.passed)
    lost = tuple(name for name in names if name in before.passed and name not in after.passed)
    return CodeBenchmark(
        name=problems.name,
        source=problems.source,
        problems=len(names),
        student=before,
        adapted=after,
        teacher=above,
        gained=gained,
        lost=lost,
        change=paired_change(len(names), len(gained), len(lost)),
        settings=settings,
        limits=run.limits,
        guards=run.guards,
    )


class _Loaded:
    """A model, loaded when it is first asked for; an adapter goes around its layers in place."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype

    @cached_property
    def untouched(self) -> Any:
        return load_model(self._folder, self._device, self._dtype)

    def adapted(self, adapter_folder: Path) -> Any:
        from moe_svd_distill.evaluation.loading import AdaptedStudent

        return AdaptedStudent.load(self.untouched, adapter_folder).model


class _Run:
    """What is the same for all models."""

    def __init__(
        self, problems: ProblemSet, settings: WritingSettings, kept: Path, on_progress: Progress | None
    ) -> None:
        self._problems, self._settings, self._kept = problems, settings, kept
        self._on_progress = on_progress or (lambda step, done, total: None)
        self.limits, self.guards = Limits(), guards()

    def solve(self, who: str, model: LocalModel, adapter: str | None, load: Callable[[], Any]) -> Solved:
        file = CompletionFile.of(self._kept, model.key, adapter, self._problems, self._settings)

        def writing(done: int, total: int) -> None:
            self._on_progress(f"{self._problems.name}: {who} writes", done, total)

        written = complete(file, self._problems, self._settings, auto_tokenizer(model.folder), load, writing)
        return self._run_all(who, written)

    def _run_all(self, who: str, written: Mapping[str, Continuation]) -> Solved:
        passed, reasons, total = [], [], len(self._problems.problems)
        for done, problem in enumerate(self._problems.problems):
            self._on_progress(f"{self._problems.name}: {who} is run", done, total)
            reason = run_program(problem.program(written[problem.task_id].text), self.limits, self.guards)
            if reason is None:
                passed.append(problem.task_id)
            else:
                reasons.append(reason)
        self._on_progress(f"{self._problems.name}: {who} is run", total, total)
        counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        unfinished = sum(found.ended == "limit" for found in written.values())
        return Solved(len(passed) / total, tuple(passed), counts, unfinished)
