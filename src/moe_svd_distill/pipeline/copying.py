"""What is read beside the text that was given: copies with the student's tokens in them, and text of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_svd_distill.fitting.copies import (
    ROUNDS,
    default_copies,
    default_own_text,
    drawn_anew,
    perturbed_copies,
    random_sequences,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_svd_distill.recipe import Recipe
    from moe_svd_distill.streaming import Head, StreamedStates

MUCH_TEXT = 65_536
"""Tokens above which training needs no copies; some text of the student's own is read all the same."""
_OWN_SHARE_OF_MUCH = 0.1

ReadStudent = Callable[[str, "NDArray[np.int64]"], "StreamedStates"]
"""A pass of the student over sequences, under a name."""


@dataclass(frozen=True)
class Copying:
    """What is read beside the text, in sequences.

    Attributes:
        copies: Copies of the whole text with tokens exchanged.
        own: Sequences of the student's own.
    """

    copies: int
    own: int

    def sequences(self, count: int) -> int:
        """How many sequences that makes for a text of so many."""
        return self.copies * count + self.own


def for_fit(recipe: Recipe, tokens: int, count: int, identical: bool) -> Copying:
    """What a fit reads beside its text.

    Args:
        recipe: What is asked for.
        tokens: Of the text.
        count: Its sequences.
        identical: Whether both models read the same tokens; nothing can be exchanged if not.
    """
    if not identical:
        return Copying(0, 0)
    copies = default_copies(tokens) if recipe.copies == "auto" else recipe.copies
    own = default_own_text(copies) if recipe.own_text == "auto" else min(recipe.own_text, copies)
    return Copying(copies - own, own * count)


def for_training(recipe: Recipe, tokens: int, count: int, identical: bool, head_moves: bool = True) -> Copying:
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
        return Copying(0, 0)
    if not identical or recipe.copies != "auto" or tokens <= MUCH_TEXT:
        return for_fit(recipe, tokens, count, identical)
    return Copying(0, math.ceil(_OWN_SHARE_OF_MUCH * count) if recipe.own_text == "auto" else recipe.own_text * count)


def draw(
    sequences: NDArray[np.int64],
    copying: Copying,
    read: ReadStudent,
    head: Head,
    seed: int,
    states: StreamedStates | None = None,
) -> NDArray[np.int64]:
    """Draw copies, then text of the student's own.

    Args:
        sequences: The text, (n, length).
        copying: How much.
        read: Passes the student over sequences.
        head: The student's head over the common tokens.
        seed: Of all draws.
        states: The student's states of the text in their first n rows, if they are there already.

    Returns:
        Token ids, (m, length).
    """
    length = sequences.shape[1]
    copied = sequences[:0]
    if copying.copies:
        mine = read("student", sequences) if states is None else states
        copied = perturbed_copies(sequences, mine, head, copying.copies, seed)
    own = random_sequences(copying.own, length, len(head.weight), seed)
    for number in range(ROUNDS if copying.own else 0):
        own = drawn_anew(own, read(f"student, its own text {number + 1}", own), head, seed + number)
    return np.concatenate([copied, own])
