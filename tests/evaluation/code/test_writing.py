"""Greedy continuations: the same in a batch as alone and as transformers writes them, and where they end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from moe_svd_distill.errors import UsageError
from moe_svd_distill.evaluation.code.writing import Writer, end_tokens
from tests.support.architectures import build

PROMPTS = ("abcdefg", "a", "hello there, this one is longer", "qwerty", "zz", "short")
LIMIT = 16


class Letters:
    """A tokenizer of one character a token; what it decodes is outside of what it encodes."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 90 + 1 for letter in text]}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(1000 + number) for number in ids)


def _stops(numbers: range) -> list[str]:
    return [chr(1000 + number) for number in numbers]


# Full and sliding attention, linear attention, a state space, a mixture of experts.
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_next", "jamba", "granitemoe"])
def test_a_text_is_continued_in_a_batch_as_it_is_alone(model_type: str) -> None:
    writer = Writer(build(model_type), Letters(), _stops(range(0, 90, 9)))
    together = writer.continue_texts(PROMPTS, LIMIT)
    assert together == [writer.continue_texts([prompt], LIMIT)[0] for prompt in PROMPTS]
    assert len({found.tokens for found in together}) > 1, "no row left its batch before another"


def test_it_is_what_transformers_writes() -> None:
    model = build("llama")
    found = Writer(model, Letters(), ()).continue_texts(PROMPTS, LIMIT)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([Letters()(prompt)["input_ids"]])
        wanted = model.generate(ids, do_sample=False, max_new_tokens=LIMIT, attention_mask=torch.ones_like(ids))
        new = [number for number in wanted[0, ids.shape[1] :].tolist() if number not in end_tokens(model, Letters())]
        assert continuation.text == Letters().decode(new)


def test_a_text_ends_before_its_stop_string() -> None:
    model = build("llama")
    free = Writer(model, Letters(), ()).continue_texts(["abc"], LIMIT)[0]
    assert free.ended == "limit"
    assert (free.tokens, len(free.text)) == (LIMIT, LIMIT)
    stop = free.text[4:6]
    stopped = Writer(model, Letters(), [stop]).continue_texts(["abc"], LIMIT)[0]
    assert stopped.ended == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.tokens == free.text.index(stop) + 2


def test_every_special_token_ends_a_text() -> None:
    model = build("llama")
    free = Writer(model, Letters(), ()).continue_texts(["abc"], LIMIT)[0]
    third = ord(free.text[2]) - 1000

    class Special(Letters):
        added_tokens_decoder = {third: type("Token", (), {"special": True})()}  # noqa: RUF012

    ended = Writer(model, Special(), ()).continue_texts(["abc"], LIMIT)[0]
    first = free.text.index(free.text[2])
    assert (ended.text, ended.ended, ended.tokens) == (free.text[:first], "end", first + 1)


def test_a_model_whose_rows_cannot_leave_is_refused_in_one_line() -> None:
    writer = Writer(build("minimax"), Letters(), _stops(range(0, 90, 3)))
    assert len(writer.continue_texts(PROMPTS[:1], LIMIT)) == 1
    with pytest.raises(UsageError, match="cannot continue 6 texts at a time") as refused:
        writer.continue_texts(PROMPTS, LIMIT)
    assert "--benchmark-batch" in str(refused.value)
