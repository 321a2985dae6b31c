"""Which documents each part of a text gets, from their lengths and groups alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from moe_svd_distill.calibration.documents import MINIMUM_UNITS
from moe_svd_distill.calibration.text import SHORTEST_SHARE, whole
from moe_svd_distill.calibration.tokenizer import IntArray


@dataclass(frozen=True)
class Spread:
    """No document gives a part more than one `documents`-th of it, no group more than one `groups`-th."""

    documents: int
    groups: int


WIDEST = Spread(MINIMUM_UNITS, MINIMUM_UNITS)
ENOUGH = tuple(Spread(16, groups) for groups in (8, 4, 2, 1))
"""16 documents are enough for error bars; the groups that checking does not need are for what is fitted on."""
SPREADS = (WIDEST, *ENOUGH, *(Spread(documents, 1) for documents in (8, 4, 2, 1)))
"""Most wanted first."""
WORTH = 0.8
"""Spreading a part leaves the rest of its documents and groups unused; this share of the tokens must remain for it."""
ROOM = 1.25
"""Groups kept for a part, to those it is spread over at least: small ones give it less than their share."""
KEPT = 1 / 8
"""Where text is short, a part that asks for less than this share of the whole keeps this share, up to what it asks."""

_STEPS = 10_000


@dataclass(frozen=True)
class Allocation:
    """What every part gets.

    Attributes:
        wanted: Tokens of each part, whole sequences.
        places: The documents of each, by their place in the lengths, ascending.
        share: Of the tokens asked for, by which all had to shrink; the last part may have got more.
    """

    wanted: tuple[int, ...]
    places: tuple[IntArray, ...]
    share: float


def allocate(lengths: IntArray, groups: IntArray, full: Sequence[int], length: int) -> Allocation | None:
    """Give parts their documents so that no group is in two, over as many groups and documents as the text allows.

    Parts take groups in their order. With too few groups for the widest spread, the largest part takes all that the
    others leave, whose number of groups then does not depend on how much they ask for. Too little text shrinks all parts by one factor, down to `KEPT`; then the smallest
    parts come first, take the smallest groups if large ones would be wasted on them, and what is left goes to the
    largest.

    Args:
        lengths: Tokens of every document, (documents,), those of a group side by side.
        groups: Number of each document's group, (documents,), ascending.
        full: Tokens of each part, whole sequences, in the order they take groups.
        length: Tokens of one sequence.

    Returns:
        None if there is not one sequence for each part.
    """
    for spread in (WIDEST, *ENOUGH):
        given = complete(lengths, groups, full, (spread,))
        if given is not None:
            wider = None if spread == WIDEST else _over_all_groups(lengths, groups, full, spread)
            return Allocation(tuple(full), tuple(wider or given), 1.0)
    ascending = np.argsort(full, kind="stable")
    found = _of_too_little(lengths, groups, [full[part] for part in ascending], length)
    if found is None:
        return None
    wanted, places = ([values[place] for place in np.argsort(ascending)] for values in (found.wanted, found.places))
    return Allocation(tuple(wanted), tuple(places), found.share)


def _over_all_groups(lengths: IntArray, groups: IntArray, full: Sequence[int], spread: Spread) -> list[IntArray] | None:
    """The parts at this spread, but the largest over as many of the groups they leave as possible; None if it is none.

    Parts that come after the largest have room to ask for more before it has other groups.
    """
    largest = int(np.argmax(full))
    before, after = list(full[:largest]), list(full[largest + 1 :])
    others = taken(lengths, groups, before + after, spread)
    if others is None:
        return None
    _, number = np.unique(groups, return_inverse=True)
    used = [int(number[places[-1]]) + 1 for places in others]
    begin_after = used[largest - 1] if before else 0
    begin = max([begin_after + ceil(ROOM * spread.groups * len(after)), *used])
    first = int(np.searchsorted(number, begin))
    for count in range(int(number[-1]) + 1 - begin, spread.groups, -1):
        found = taken(lengths[first:], groups[first:], [full[largest]], Spread(spread.documents, count))
        if found is not None:
            return [*others[:largest], found[0] + first, *others[largest:]]
    return None


def _of_too_little(lengths: IntArray, groups: IntArray, full: Sequence[int], length: int) -> Allocation | None:
    """Of budgets in ascending order, in the order of groups that leaves more."""
    drawn = _shrunk(lengths, groups, full, length)
    rank = np.argsort(np.argsort(np.bincount(groups, weights=lengths), kind="stable"), kind="stable")[groups]
    order = np.argsort(rank, kind="stable")
    by_size = _shrunk(lengths[order], rank[order], full, length)
    if by_size is None or (drawn is not None and drawn.share >= WORTH * by_size.share):
        return drawn
    return replace(by_size, places=tuple(np.sort(order[place]) for place in by_size.places))


def complete(
    lengths: IntArray, groups: IntArray, full: Sequence[int], spreads: Sequence[Spread]
) -> list[IntArray] | None:
    """The documents of each part over the first of these spreads that gives them all they ask for, if one does."""
    if lengths.sum() < sum(full):
        return None
    return next((found for spread in spreads if (found := taken(lengths, groups, full, spread)) is not None), None)


def taken(lengths: IntArray, groups: IntArray, wanted: Sequence[int], spread: Spread) -> list[IntArray] | None:
    """The documents of each part if each takes the next groups until it has its tokens; None if they do not suffice."""
    places: list[IntArray] = []
    begin = 0
    for tokens in wanted:
        of_document, of_group = (
            max(ceil(tokens / parts), SHORTEST_SHARE) for parts in (spread.documents, spread.groups)
        )
        here = groups[begin:]
        given = np.minimum(lengths[begin:], of_document)
        before = np.cumsum(given) - given
        of_group_before = before - before[np.searchsorted(here, here)]
        given = np.clip(of_group - of_group_before, 0, given)
        reached = np.cumsum(given)
        last = int(np.searchsorted(reached, tokens))
        if last == len(reached):
            return None
        places.append(np.flatnonzero(given[: last + 1]) + begin)
        begin += int(np.searchsorted(here, here[last], side="right"))
    return places


def _shrunk(lengths: IntArray, groups: IntArray, full: Sequence[int], length: int) -> Allocation | None:
    """As much of the budgets, over as many groups and documents, as the text allows in this order of groups."""

    def shrunk(step: int) -> list[int]:
        least = int(KEPT * sum(full) * step) // _STEPS
        return [whole(min(tokens, max(tokens * step // _STEPS, least)), length) for tokens in full]

    def most_steps(spread: Spread) -> int:
        """The most steps at which there is text for all; -1 if there is none for one sequence each."""

        def lacking(step: int) -> int:
            return int(taken(lengths, groups, shrunk(step), spread) is None)

        return bisect_right(range(_STEPS + 1), 0, key=lacking) - 1

    most = {spread: most_steps(spread) for spread in SPREADS}
    everything = most[SPREADS[-1]]
    if everything < 0:
        return None
    spread = next(
        spread
        for spread in SPREADS
        if most[spread] >= WORTH * everything and (spread != WIDEST or most[spread] == most[ENOUGH[0]])
    )
    *others, last = shrunk(most[spread])

    def too_much(sequences: int) -> int:
        return int(taken(lengths, groups, [*others, sequences * length], spread) is None)

    possible = range(last // length, full[-1] // length + 1)
    wanted = [*others, possible[bisect_right(possible, 0, key=too_much) - 1] * length]
    places = taken(lengths, groups, wanted, spread)
    assert places is not None, "the last part has at least what it had of the common factor"
    return Allocation(tuple(wanted), tuple(places), most[spread] / _STEPS)
