"""How teacher, student and adapted student go on with a little of the held-out text: to be looked at, not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_svd_distill.calibration.text import TokenizedText
from moe_svd_distill.errors import DistillError

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 32, 32


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations of passages from a text.

    Attributes:
        prompts: The passages.
        texts: Who wrote (``teacher``, ``student``, ``adapted``; ``text`` is how the text itself goes on) to one
            continuation of each passage.
        skipped: Who did not, and why.
        new_tokens: Tokens of each at most.
    """

    prompts: tuple[str, ...] = ()
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    new_tokens: int = NEW_TOKENS

    @classmethod
    def of(cls, text: TokenizedText, folder: str | Path) -> Continuations:
        """The passages alone, and how the text goes on: the beginnings of sequences all over the text.

        Args:
            text: As the student reads it.
            folder: The student with its tokenizer.
        """
        from moe_svd_distill.calibration.tokenizer import auto_tokenizer

        try:
            tokenizer = auto_tokenizer(Path(folder))
        except DistillError as error:
            return cls(skipped=dict.fromkeys(("teacher", "student", "adapted"), error.what))
        count = min(PROMPTS, len(text.sequences))
        rows = [text.sequences[len(text.sequences) * n // count] for n in range(count)]
        prompt = min(PROMPT_TOKENS, text.length // 2)
        halves = ((row[:prompt], row[prompt : prompt + NEW_TOKENS]) for row in rows)
        read = [tuple(tokenizer.decode(half.tolist(), skip_special_tokens=True) for half in pair) for pair in halves]
        kept = [pair for pair in read if pair[0].strip()]
        return cls(tuple(begun for begun, _ in kept), {"text": tuple(rest for _, rest in kept)})

    def without(self, name: str, reason: str) -> Continuations:
        """With the reason why one of the models did not write."""
        return replace(self, skipped={**self.skipped, name: reason})

    def by(self, name: str, model: Any, folder: str | Path) -> Continuations:
        """With what a model writes, or why it cannot.

        Args:
            name: Who it is.
            model: A transformers causal language model.
            folder: With its tokenizer.
        """
        from moe_svd_distill.calibration.tokenizer import auto_tokenizer
        from moe_svd_distill.evaluation.code.writing import Writer

        if not self.prompts:
            return self
        try:
            writer = Writer(model, auto_tokenizer(Path(folder)), stops=())
            found = tuple(each.text for each in writer.continue_texts(self.prompts, NEW_TOKENS))
        except DistillError as error:
            return self.without(name, error.what)
        return replace(self, texts={**self.texts, name: found})
