"""How much of an adapter to keep, with nothing as a valid answer.

The scale is chosen on one part of the search text and must prove itself on the other, document by document. What does
not measurably lower KL without raising cross-entropy is scaled to nothing, in words that say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_svd_distill.evaluation.figures import Change, Measurement, cross_entropy_change, kl_change, plain

Evaluate: TypeAlias = Callable[[Mapping[str, float]], Measurement]
"""Measures the student at one scale per group; must be the untouched student at 0."""

GLOBAL_SCALES = (0.125, 0.25, 0.5, 0.75, 1.0)
_SMALLEST_STEP = 1e-3  # of the untouched KL: what a group's scale must gain to be worth having
_NO_HELP = "at every scale above 0 the adapter harms, or does not measurably help, the student on calibration text"


@dataclass(frozen=True)
class Guard:
    """What an adapter must do, on text the scale was not chosen on, to be kept.

    Attributes:
        errors: The fall of KL must exceed so many paired standard errors over documents (see `Change.margin`).
        cross_entropy_errors: Cross-entropy may not rise by more than so many of its own.
        share: The fall of KL must be at least this share of the KL there is.
    """

    errors: float = 3.0
    cross_entropy_errors: float = 1.0
    share: float = 0.02


@dataclass(frozen=True)
class Trial:
    """One setting that was tried: the figures on a part of the text and what fell there, in nats per token."""

    scales: Mapping[str, float]
    kl: float
    cross_entropy: float
    kl_fall: float
    kl_fall_error: float
    cross_entropy_fall: float
    cross_entropy_fall_error: float
    documents: int


@dataclass(frozen=True)
class ScaleSearch:
    """What the search found.

    Attributes:
        scales: Scale of each group; all 0 when nothing is to be kept.
        accepted: Whether anything is kept.
        decision: One or two sentences for the user.
        trials: Everything tried, in order; the first is the untouched student.
        confirmation: The chosen setting on the confirming part of the text; None when nothing helped on the other.
    """

    scales: Mapping[str, float]
    accepted: bool
    decision: str
    trials: tuple[Trial, ...]
    confirmation: Trial | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return plain(self)


def search_scale(
    evaluate: Evaluate,
    groups: Sequence[str],
    *,
    confirm: Evaluate | None = None,
    guard: Guard | None = None,
    global_scales: Sequence[float] = GLOBAL_SCALES,
    by_group: bool = True,
) -> ScaleSearch:
    """Search one scale for the whole adapter, then one for each group, and accept only what is proven.

    Args:
        evaluate: Measures the student at given scales; called up to 7 times and up to 3 times for each group.
        groups: The groups of the adapter, for example `AdaptedStudent.groups`.
        confirm: The same on other text, called twice; without it, the documents of `evaluate` are divided in two
            halves for choosing and confirming, which costs twice the time for as much text to choose on.
        guard: What must hold for the adapter to be kept.
        global_scales: Scales above 0 to try for everything together.
        by_group: Whether to go on from the best of these and halve or raise the scale of each group in turn.
    """
    return _Search(evaluate, confirm, groups, guard or Guard()).run(global_scales, by_group)


class _Search:
    def __init__(self, evaluate: Evaluate, confirm: Evaluate | None, groups: Sequence[str], guard: Guard) -> None:
        self.evaluate, self.confirm, self.groups, self.guard = evaluate, confirm, tuple(groups), guard
        self.known: dict[tuple[float, ...], Measurement] = {}
        self.nothing = dict.fromkeys(self.groups, 0.0)
        tokens = self.measured(self.nothing).tokens
        self.choosing, self.confirming = halves(tokens) if confirm is None else (np.arange(len(tokens)),) * 2
        self.best, self.best_kl = self.nothing, self.kl(self.nothing)

    def run(self, global_scales: Sequence[float], by_group: bool) -> ScaleSearch:
        for scale in global_scales:
            self.consider(dict.fromkeys(self.groups, scale))
        if self.best != self.nothing:
            self.refine_globally(sorted({0.0, *global_scales}))
        several = by_group and len(self.groups) > 1
        if several and self.best == self.nothing:
            self.try_groups_alone()
        if several and self.best != self.nothing:
            self.refine_groups()
        return self.verdict()

    def measured(self, scales: Mapping[str, float]) -> Measurement:
        key = tuple(scales[group] for group in self.groups)
        if key not in self.known:
            self.known[key] = self.evaluate(dict(scales))
        return self.known[key]

    def chosen_on(self, scales: Mapping[str, float]) -> Measurement:
        return self.measured(scales).of(self.choosing)

    def confirmed_on(self, scales: Mapping[str, float]) -> Measurement:
        return self.confirm(dict(scales)) if self.confirm else self.measured(scales).of(self.confirming)

    def kl(self, scales: Mapping[str, float]) -> float:
        """KL on the choosing part; infinite where it is bought with cross-entropy."""
        measurement = self.chosen_on(scales)
        change = cross_entropy_change(self.chosen_on(self.nothing), measurement)
        if change.rises(self.guard.cross_entropy_errors):
            return float("inf")
        return float(measurement.kl.sum() / measurement.tokens.sum())

    def consider(self, scales: Mapping[str, float]) -> bool:
        kl = self.kl(scales)
        if not kl < self.best_kl:
            return False
        self.best, self.best_kl = dict(scales), kl
        return True

    def refine_globally(self, grid: Sequence[float]) -> None:
        """Try the lowest point of the parabola through the best scale and its neighbours."""
        scale = next(iter(self.best.values()))
        place = grid.index(scale)
        if place in (0, len(grid) - 1):
            return
        points = grid[place - 1 : place + 2]
        heights = [self.kl(dict.fromkeys(self.groups, point)) for point in points]
        if all(np.isfinite(heights)):
            a, b, _ = np.polyfit(points, heights, 2)
            if a > 0:
                self.consider(dict.fromkeys(self.groups, round(float(-b / (2 * a)), 3)))

    def try_groups_alone(self) -> None:
        """One harmful group may spoil the others: try each by itself."""
        for group in self.groups:
            self.consider({**self.nothing, group: 0.5})

    def refine_groups(self) -> None:
        """For each group that acts: half its scale, and nothing if that helped, else half as much again."""
        for group in self.groups:
            start = self.best[group]
            if start == 0.0:
                continue
            if self.improve({**self.best, group: round(start * 0.5, 3)}):
                self.improve({**self.best, group: 0.0})
            else:
                self.improve({**self.best, group: round(start * 1.5, 3)})

    def improve(self, scales: Mapping[str, float]) -> bool:
        """Consider a setting that differs in one group, where differences within noise are left alone."""
        change = kl_change(self.chosen_on(self.best), self.chosen_on(scales))
        matters = change.falls(1.0) and change.fall > _SMALLEST_STEP * self.kl(self.nothing)
        return matters and self.consider(scales)

    def verdict(self) -> ScaleSearch:
        untouched = self.chosen_on(self.nothing)
        settings = [dict(zip(self.groups, key, strict=True)) for key in self.known]
        trials = tuple(_trial(scales, untouched, self.chosen_on(scales)) for scales in settings)
        confirmation = None
        if self.best != self.nothing:
            confirmation = _trial(self.best, self.confirmed_on(self.nothing), self.confirmed_on(self.best))
        failure = self.failure(confirmation)
        if failure:
            return ScaleSearch(self.nothing, False, f"Nothing was transferred: {failure}.", trials, confirmation)
        assert confirmation is not None
        scales = ", ".join(f"{group} {scale:g}" for group, scale in self.best.items())
        share = confirmation.kl_fall / (confirmation.kl + confirmation.kl_fall)
        decision = (
            f"Kept at scale {scales}: on text the scale was not chosen on, KL falls by {share:.1%} "
            f"({confirmation.kl_fall:.4f} ± {confirmation.kl_fall_error:.4f} nats per token) "
            f"and cross-entropy by {confirmation.cross_entropy_fall:.4f} ± {confirmation.cross_entropy_fall_error:.4f}."
        )
        return ScaleSearch(self.best, True, decision, trials, confirmation)

    def failure(self, confirmation: Trial | None) -> str:
        """Say why nothing is kept, or nothing."""
        if confirmation is None:
            return _NO_HELP
        fall = Change(confirmation.kl_fall, confirmation.kl_fall_error, confirmation.documents)
        entropy = Change(confirmation.cross_entropy_fall, confirmation.cross_entropy_fall_error, confirmation.documents)
        before = confirmation.kl + confirmation.kl_fall
        best = f"the best scale lowers KL by {fall.fall / before:.1%} of the gap" if before > 0 else "there is no gap"
        if not fall.falls(self.guard.errors):
            return f"{_NO_HELP} ({fall.fall:.5f} ± {fall.error:.5f} nats per token at best)"
        if fall.fall < self.guard.share * before:
            return f"{best} on calibration text, less than the {self.guard.share:.0%} that would count"
        if entropy.rises(self.guard.cross_entropy_errors):
            return f"{best} on calibration text, but cross-entropy rises by {-entropy.fall:.4f} nats per token"
        return ""


def halves(tokens: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide documents into two halves of about as many tokens, by index: each, largest first, to the lighter half."""
    chosen: tuple[list[int], list[int]] = ([], [])
    weight = [0.0, 0.0]
    for document in np.argsort(-tokens, kind="stable"):
        lighter = int(weight[1] < weight[0])
        chosen[lighter].append(int(document))
        weight[lighter] += float(tokens[document])
    first, second = (np.asarray(sorted(half), dtype=np.int64) for half in chosen)
    return first, second


def _trial(scales: Mapping[str, float], before: Measurement, after: Measurement) -> Trial:
    kl, entropy, tokens = kl_change(before, after), cross_entropy_change(before, after), after.tokens.sum()
    return Trial(
        scales=dict(scales),
        kl=float(after.kl.sum() / tokens),
        cross_entropy=float(after.cross_entropy.sum() / tokens),
        kl_fall=kl.fall,
        kl_fall_error=kl.error,
        cross_entropy_fall=entropy.fall,
        cross_entropy_fall_error=entropy.error,
        documents=kl.documents,
    )
