"""What is asked of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, get_args

from moe_svd_distill.errors import UsageError
from moe_svd_distill.evaluation.code.problems import is_code_benchmark
from moe_svd_distill.files.names import CACHE_FOLDER

if TYPE_CHECKING:
    import torch

    from moe_svd_distill.calibration.paired import VocabularyMode
    from moe_svd_distill.evaluation.loading import Mode

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done and how much there is to do; 0 where that is not known."""


Dtype: TypeAlias = Literal["auto", "float32", "bfloat16"]
"""Type a model computes in, in the words of a recipe's `training.dtype`."""


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
    include_path: Path | str | None = None
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


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure of an adapter, and how.

    Attributes:
        adapter: Its folder.
        teacher: Folder or hub id; default: the one in run.json.
        student: Folder or hub id; default: the one in run.json or adapter_config.json.
        texts: Held-out text.
        benchmarks: Benchmarks to run.
        tokens: Tokens of the text to read at most; None for all.
        length: Tokens of a sequence at most.
        seed: Of the order of documents, the controls, the bootstrap and the examples of benchmarks.
        controls: Random deltas to measure.
        device: Where the models run; `auto` is the first CUDA device, or the CPU.
        dtype: Type the models compute in. `auto`: float32 on a CPU and bfloat16 elsewhere; of a model that is read
            layer by layer, and of one that writes programs, the type that the device multiplies fastest.
        mode: Whether models are held in memory; `auto` decides for each of them by the free memory.
        cache: Where streamed states and written programs lie; default: `cache` in the adapter's folder. States of the
            teacher and of the untouched student stay there for the next evaluation on the same text.
        vocabulary: `equal` demands that both models number their tokens alike. `shared` takes any two tokenizers and
            compares what they have in common, at the places where both have read the same characters. Default: what
            the run asked for, else `equal`.
        report_to: Trackers that the figures go to; default: those of the run.
    """

    adapter: Path
    teacher: str | None = None
    student: str | None = None
    texts: tuple[Path, ...] = ()
    benchmarks: BenchmarkRequest | None = None
    tokens: int | None = 50_000
    length: int = 512
    seed: int = 0
    controls: int = 1
    device: str = "auto"
    dtype: Dtype = "auto"
    mode: Mode = "auto"
    cache: Path | str | None = None
    vocabulary: VocabularyMode | None = None
    report_to: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            raise UsageError(f"dtype: found {self.dtype}, expected auto, float32 or bfloat16", "Correct that value")
        for name, value in (("adapter", Path(self.adapter)), ("texts", tuple(map(Path, self.texts)))):
            object.__setattr__(self, name, value)
        if self.device == "auto":
            import torch

            object.__setattr__(self, "device", "cuda:0" if torch.cuda.is_available() else "cpu")

    @property
    def cache_folder(self) -> Path:
        """Where what stays for the next evaluation lies."""
        return Path(self.cache) if self.cache else self.adapter / CACHE_FOLDER

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type that was asked for; None for `auto`."""
        import torch

        return None if self.dtype == "auto" else getattr(torch, self.dtype)


class EvaluationOptions(TypedDict, total=False):
    """The fields of an `EvaluationRequest` but for its adapter and texts, by name."""

    teacher: str | None
    student: str | None
    benchmarks: BenchmarkRequest | None
    tokens: int | None
    length: int
    seed: int
    controls: int
    device: str
    dtype: Dtype
    mode: Mode
    cache: Path | str | None
    vocabulary: VocabularyMode | None
    report_to: tuple[str, ...] | None
