"""What a model writes to problems: greedy continuation in batches, kept on disk batch by batch.

Rows that are done leave their batch: on a CPU that is what saves the time, since most completions are over long before
the longest. A killed run goes on with the next batch. Batches are settled by all problems before the first is written,
so that what a model writes does not depend on where a run was stopped: in 16 bits, a sum over other neighbours can come
out differently.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.errors import BadDataError, UsageError, reason_of
from moe_svd_distill.evaluation.code.problems import ProblemSet, by_length
from moe_svd_distill.evaluation.code.result import WritingSettings
from moe_svd_distill.files.writing import make_folder, write_text

STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint(", "\nassert ", "\n```")
"""What begins at the margin after a function's body; the text ends before it."""


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Attributes:
        text: Without the stop string.
        tokens: Tokens it took, the last one included.
        ended: `stop`: a stop string; `end`: the model ended the text; `limit`: neither within the limit.
    """

    text: str
    tokens: int
    ended: str


@dataclass
class _Row:
    ids: list[int] = field(default_factory=list)
    ended: str = ""


class Writer:
    """A model and its tokenizer.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer as transformers loads it.
        stops: Strings that end a text.
    """

    def __init__(self, model: Any, tokenizer: Any, stops: Sequence[str] = STOPS) -> None:
        self._model, self._tokenizer, self._stops = model, tokenizer, tuple(stops)
        self._ends = end_tokens(model, tokenizer)
        # A token reads at least one character, except for parts of characters, which no stop string has.
        self._window = max(map(len, self._stops), default=0) + 4
        taken = inspect.signature(model.forward).parameters
        self._options = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in taken else {})}
        self._positions = "position_ids" in taken

    @torch.no_grad()
    def continue_texts(self, prompts: Sequence[str], limit: int) -> list[Continuation]:
        """Continue every text of one batch by the likeliest token at a time.

        Args:
            prompts: The texts, as they are: no chat template.
            limit: New tokens at most.

        Raises:
            UsageError: The model does not take so many at a time, or none of them by such steps.
        """
        try:
            return self._continue_texts(prompts, limit)
        except RuntimeError as error:  # no memory, or a cache of the model's own that rows cannot leave
            raise UsageError(
                f"{type(self._model).__name__} cannot continue {len(prompts)} texts at a time ({reason_of(error)})",
                "Give a smaller --benchmark-batch",
            ) from error

    def _continue_texts(self, prompts: Sequence[str], limit: int) -> list[Continuation]:
        ids, mask = self._left_padded([self._tokenizer(prompt)["input_ids"] for prompt in prompts])
        rows = [_Row() for _ in prompts]
        going, cache, fed = rows, None, ids
        for _ in range(limit):
            output = self._forward(fed, mask, cache)
            chosen = output.logits[:, -1].argmax(-1)
            for row, token in zip(going, chosen.tolist(), strict=True):
                row.ids.append(token)
                row.ended = self._end_of(row.ids)
            keep = [place for place, row in enumerate(going) if not row.ended]
            if not keep:
                break
            cache = output.past_key_values
            if cache is None:
                raise UsageError(
                    f"{type(self._model).__name__} keeps no state between tokens", "Leave this benchmark out for it"
                )
            if len(keep) < len(going):
                index = torch.tensor(keep, device=mask.device)
                cache.reorder_cache(index)  # the one selection of rows that every kind of cache has
                going, mask, chosen = [going[place] for place in keep], mask[index], chosen[index]
            fed, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
        return [self._continuation(row) for row in rows]

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Any:
        options: dict[str, Any] = dict(self._options)
        if self._positions:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self._model(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)

    def _left_padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, sequence in enumerate(sequences):
            ids[place, longest - len(sequence) :] = torch.tensor(list(sequence), dtype=torch.long)
            mask[place, longest - len(sequence) :] = 1
        return ids.to(self._model.device), mask.to(self._model.device)

    def _end_of(self, ids: Sequence[int]) -> str:
        if ids[-1] in self._ends:
            return "end"
        tail = self._decode(ids[-self._window :])
        return "stop" if any(stop in tail for stop in self._stops) else ""

    def _continuation(self, row: _Row) -> Continuation:
        text = self._decode([token for token in row.ids if token not in self._ends])
        cut = min((place for place in map(text.find, self._stops) if place >= 0), default=len(text))
        return Continuation(text[:cut], len(row.ids), row.ended or "limit")

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: those the model names, and every special token, which no program contains."""
    ends = {number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    for settings in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        named = getattr(settings, "eos_token_id", None)
        ends.update(named if isinstance(named, list | tuple) else () if named is None else (named,))
    return frozenset(ends)


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
            model: The checkpoint's key.
            adapter: Sha256 of the adapter's file; None without one.
            problems: What is completed.
            settings: How.
        """
        import peft
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
