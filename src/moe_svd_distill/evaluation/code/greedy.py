"""Greedy continuation of texts in batches, with a cache of keys and values; rows that are done leave their batch.

On a CPU that is what saves the time: most completions are over long before the longest of their batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_svd_distill.errors import UsageError
from moe_svd_distill.evaluation.loading import first_line

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
    number: int
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
                f"{type(self._model).__name__} cannot continue {len(prompts)} texts at a time ({first_line(error)})",
                "Give a smaller --benchmark-batch",
            ) from error

    def _continue_texts(self, prompts: Sequence[str], limit: int) -> list[Continuation]:
        ids, mask = self._left_padded([self._tokenizer(prompt)["input_ids"] for prompt in prompts])
        rows = [_Row(number) for number in range(len(prompts))]
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
