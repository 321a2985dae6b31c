"""Copies of a text in which some tokens are replaced by what the student itself expects there, and text of its own.

The teacher's distribution is a label for any text, so a little text can be read in many contexts. With 8,192 tokens
and seven copies the held-out gap closed by the head rose from 15 to 25 % on the lab's independent pair; replacements
drawn at random from the text gave 20 (docs/decisions/0011). Text that the student draws by itself is of every kind it
knows: with some of it a fit on one kind of text does not harm the others (docs/decisions/0018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_svd_distill.streaming import Head, StreamedStates

if TYPE_CHECKING:
    from moe_svd_distill.recipe import Recipe

MUCH_TEXT = 65_536
"""Tokens above which training needs no copies; some text of the student's own is read all the same."""
_OWN_SHARE_OF_MUCH = 0.1

ReadStudent = Callable[[str, NDArray[np.int64]], StreamedStates]
"""A pass of the student over sequences, under a name."""
SHARES = (0.3, 0.6)
_FEW = 3
MOST_COPIES = 7
_MOST_TOKENS = 262_144
_FEWEST = 2
_LOGIT_BYTES = 64 << 20
_OWN_SHARE = 0.4
ROUNDS = 3
"""How often text that begins as random tokens is drawn anew from what the student expects."""


@dataclass(frozen=True)
class ExtraText:
    """What is read beside the text, in sequences.

    Attributes:
        copies: Copies of the whole text with tokens exchanged.
        generated: Sequences that the student draws by itself.
    """

    copies: int
    generated: int

    def sequences(self, count: int) -> int:
        """How many sequences that makes for a text of so many."""
        return self.copies * count + self.generated


def for_fit(recipe: Recipe, tokens: int, count: int, identical: bool) -> ExtraText:
    """What a fit reads beside its text.

    Args:
        recipe: What is asked for.
        tokens: Of the text.
        count: Its sequences.
        identical: Whether both models read the same tokens; nothing can be exchanged if not.
    """
    if not identical:
        return ExtraText(0, 0)
    copies = default_copies(tokens) if recipe.copies == "auto" else recipe.copies
    generated = default_generated(copies) if recipe.own_text == "auto" else min(recipe.own_text, copies)
    return ExtraText(copies - generated, generated * count)


def for_training(recipe: Recipe, tokens: int, count: int, identical: bool, head_moves: bool = True) -> ExtraText:
    """What training reads beside its text: as a fit does of little text; of much, a tenth of the student's own.

    Copies show rows of the head in more contexts. Where it stands still they cost seven times the reading and gain
    nothing (docs/decisions/0025).

    Args:
        recipe: As of `for_fit`.
        tokens: As of `for_fit`.
        count: As of `for_fit`.
        identical: As of `for_fit`.
        head_moves: Whether the head is trained.
    """
    if not head_moves and recipe.copies == "auto":
        return ExtraText(0, 0)
    if not identical or recipe.copies != "auto" or tokens <= MUCH_TEXT:
        return for_fit(recipe, tokens, count, identical)
    return ExtraText(0, math.ceil(_OWN_SHARE_OF_MUCH * count) if recipe.own_text == "auto" else recipe.own_text * count)


def draw(
    sequences: NDArray[np.int64],
    extra: ExtraText,
    read: ReadStudent,
    head: Head,
    seed: int,
) -> NDArray[np.int64]:
    """Draw copies, then text of the student's own.

    Args:
        sequences: The text, (n, length).
        extra: How much.
        read: Passes the student over sequences.
        head: The student's head over the common tokens.
        seed: Of all draws.

    Returns:
        Token ids, (m, length).
    """
    length = sequences.shape[1]
    copied = sequences[:0]
    if extra.copies:
        copied = perturbed_copies(sequences, read("student", sequences), head, extra.copies, seed)
    generated = random_sequences(extra.generated, length, len(head.weight), seed)
    for number in range(ROUNDS if extra.generated else 0):
        states = read(f"student, its own text {number + 1}", generated)
        generated = resample_tokens(generated, states, head, seed + number)
    return np.concatenate([copied, generated])


def default_copies(tokens: int) -> int:
    """How many copies pay: many of little text, few of much."""
    return int(np.clip(_MOST_TOKENS // tokens - 1, _FEWEST, MOST_COPIES))


def default_generated(copies: int) -> int:
    """How many of the copies are text of the student's own."""
    return round(_OWN_SHARE * copies)


def random_sequences(count: int, length: int, tokens: int, seed: int) -> NDArray[np.int64]:
    """Uniformly random token ids, (count, length): where text of the student's own begins."""
    return np.random.default_rng([seed, count, length]).integers(0, tokens, (count, length))


@torch.no_grad()
def resample_tokens(sequences: NDArray[np.int64], states: StreamedStates, head: Head, seed: int) -> NDArray[np.int64]:
    """Every token but the first drawn from the student's prediction before it.

    Args:
        sequences: Token ids, (n, length).
        states: The student's final states of exactly these, (n, length, d).
        head: The student's head over the tokens that both models have.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    result = sequences.copy()
    for row in range(len(sequences)):
        for place, expected in _expectations(states, head, row):
            result[row, place] = _one_each(expected, generator).numpy()
    return result


def _one_each(expected: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each place, (places,), of probabilities (places, v), by one random number each."""
    summed = expected.cumsum(dim=-1)
    chosen = torch.rand(len(expected), 1, generator=generator) * summed[:, -1:]
    return torch.searchsorted(summed, chosen, right=True)[:, 0].clamp_max(expected.shape[1] - 1)


@torch.no_grad()
def perturbed_copies(
    sequences: NDArray[np.int64], states: StreamedStates, head: Head, copies: int, seed: int
) -> NDArray[np.int64]:
    """Copies of sequences with 30 or 60 % of their tokens drawn from the student's prediction before them.

    Few copies (of much text) are all of 30 %; of many, every other one is of 60 %. The first token of a sequence, which
    nothing predicts, always stays.

    Args:
        sequences: Token ids, (n, length).
        states: The student's final states of exactly these in its first n rows, (n, length, d).
        head: The student's head over the tokens that both models have.
        copies: How many.
        seed: Of the draws.

    Returns:
        Token ids, (copies · n, length), copy after copy.
    """
    count, length = sequences.shape
    generator = torch.Generator().manual_seed(seed)
    result = np.repeat(sequences[None], copies, axis=0)
    if copies == 0:
        return result.reshape(0, length)
    used = SHARES if copies > _FEW else SHARES[:1]
    shares = torch.tensor([used[copy % len(used)] for copy in range(copies)])
    for row in range(count):
        for place, expected in _expectations(states, head, row):
            drawn = torch.multinomial(expected, copies, replacement=True, generator=generator).T
            replaced = torch.rand(drawn.shape, generator=generator) < shares[:, None]
            before = torch.from_numpy(np.ascontiguousarray(result[:, row, place]))
            result[:, row, place] = torch.where(replaced, drawn, before).numpy()
    return result.reshape(copies * count, length)


def _expectations(states: StreamedStates, head: Head, row: int) -> Iterator[tuple[slice, Tensor]]:
    """Places of a sequence and the student's probabilities for the tokens there, (places, v), piece by piece."""
    hidden = states.rows(slice(row, row + 1))[0, :-1]
    step = max(1, _LOGIT_BYTES // (4 * len(head.weight)))
    for begin in range(0, len(hidden), step):
        part = hidden[begin : begin + step]
        yield slice(begin + 1, begin + 1 + len(part)), torch.softmax(head.logits(part), dim=-1).cpu()
