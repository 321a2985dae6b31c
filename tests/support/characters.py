"""A tokenizer with one token a character."""

from __future__ import annotations

from collections.abc import Sequence

from moe_svd_distill.calibration.chat import Chat
from moe_svd_distill.calibration.tokenizer import Tokenizer, TokenSpans


class _Characters(Tokenizer):
    """One token a character, without a folder."""

    def __init__(self) -> None:
        self.end_of_text = 0

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]

    def encode_spans(self, texts: Sequence[str]) -> list[TokenSpans]:
        raise NotImplementedError

    def render(self, chat: Chat, where: str) -> str:
        raise NotImplementedError


PLAIN: Tokenizer = _Characters()
