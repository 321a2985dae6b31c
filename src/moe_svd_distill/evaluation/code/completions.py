"""Completions of problems, kept on disk batch by batch: a killed run goes on with the next batch.

Batches are settled by all problems before the first is written, so that what a model writes does not depend on where
a run was stopped: in 16 bits, a sum over other neighbours can come out differently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.code.greedy import STOPS, Continuation, Writer
from moe_svd_distill.evaluation.code.problems import ProblemSet, by_length
from moe_svd_distill.files.writing import make_folder, write_text


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
class CompletionFile:
    """Completions of one model, JSON lines: first what they depend on, then one problem a line.

    Attributes:
        path: Of the file.
        depends_on: The model, its adapter, the problems, the settings and versions.
    """

    path: Path
    depends_on: Mapping[str, Any]

    @classmethod
    def of(
        cls, folder: Path, model: str, adapter: str | None, problems: ProblemSet, settings: WritingSettings
    ) -> CompletionFile:
        """The file for one model in a folder of completions.

        Args:
            folder: Where completions are kept.
            model: The checkpoint's fingerprint.
            adapter: Sha256 of the adapter's file; None without one.
            problems: What is completed.
            settings: How.
        """
        import peft
        import torch
        import transformers

        depends_on = {
            "model": model,
            "adapter": adapter,
            "problems": problems.digest,
            **asdict(settings),
            "stops": list(STOPS),
            "versions": [str(module.__version__) for module in (torch, transformers, peft)],
        }
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
        return cls(folder / f"completions-{key}.jsonl", depends_on)

    def read(self) -> dict[str, Continuation]:
        """What is there, by problem.

        Raises:
            BadDataError: The file is damaged.
        """
        if not self.path.is_file():
            return {}
        try:
            first, *lines = (json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines())
            if first != self.depends_on:
                raise ValueError("its first line says that it is of something else")
            return {line.pop("task_id"): Continuation(**line) for line in lines}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadDataError(f"{self.path} is damaged ({error})", "Delete the file") from error

    def write(self, completions: Mapping[str, Continuation]) -> None:
        """Replace the file; it is whole at every moment."""
        make_folder(self.path.parent)
        lines = [self.depends_on, *({"task_id": name, **asdict(found)} for name, found in completions.items())]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))


def complete(
    file: CompletionFile,
    problems: ProblemSet,
    settings: WritingSettings,
    tokenizer: Any,
    model: Callable[[], Any],
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Continuation]:
    """Complete every problem, as far as that is not in the file.

    Args:
        file: Where completions are kept.
        problems: What to complete.
        settings: How.
        tokenizer: As transformers loads it.
        model: Loads the model; called once, and only if something is missing.
        on_progress: Told problems done and problems to do.

    Returns:
        Completions by problem.
    """
    done = file.read()
    lengths = [len(tokenizer(problem.prompt)["input_ids"]) for problem in problems.problems]
    batches = by_length(problems.problems, lengths, settings.batch)
    writer: Writer | None = None
    for batch in _progress(batches, len(lengths), on_progress):
        chosen = [problems.problems[number] for number in batch]
        if all(problem.task_id in done for problem in chosen):
            continue
        writer = writer or Writer(model(), tokenizer)
        found = writer.continue_texts([problem.prompt for problem in chosen], settings.limit)
        done |= {problem.task_id: text for problem, text in zip(chosen, found, strict=True)}
        file.write(done)
    return done


def _progress(
    batches: list[list[int]], total: int, on_progress: Callable[[int, int], None] | None
) -> Iterator[list[int]]:
    told = on_progress or (lambda done, of: None)
    done = 0
    for batch in batches:
        told(done, total)
        yield batch
        done += len(batch)
    told(done, total)
