"""What programming problems find, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_svd_distill.evaluation.code.sandbox import Guards, Limits


@dataclass(frozen=True)
class PairedChange:
    """A change of a share of problems.

    Attributes:
        change: (gained − lost) / problems.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p_value: McNemar's exact test, two-sided.
    """

    change: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class WritingSettings:
    """How completions are written.

    Attributes:
        limit: New tokens at most.
        batch: Problems at a time.
        dtype: Of the model.
        device: Its type: `cpu` or `cuda`.
    """

    limit: int
    batch: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Solved:
    """What one model makes of the problems.

    Attributes:
        pass_at_1: Share of problems whose one completion passes the tests.
        passed: Their names.
        reasons: How often the others ended with which error.
        unfinished: Completions that met the limit of tokens.
    """

    pass_at_1: float
    passed: tuple[str, ...]
    reasons: Mapping[str, int]
    unfinished: int


@dataclass(frozen=True)
class CodeBenchmark:
    """The result of one set of problems.

    Attributes:
        name: `humaneval`, or `humaneval:` and the file's name.
        source: Package and version, or the file's name.
        problems: How many.
        student: Untouched.
        adapted: With the adapter as PEFT loads it, unmerged.
        teacher: None where it was not asked for.
        gained: Problems that only the adapted student passes.
        lost: Problems that only the untouched student passes.
        change: With the exact paired interval.
        settings: How completions were written: `limit`, `batch`, `dtype`, `device`.
        limits: What each program might use.
        guards: What else held for the programs.
    """

    name: str
    source: str
    problems: int
    student: Solved
    adapted: Solved
    teacher: Solved | None
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    change: PairedChange
    settings: WritingSettings
    limits: Limits
    guards: Guards
