"""How much of an adapter to keep, with nothing as a valid answer.

One scale for the whole adapter is searched among those that are proven to help (see `guard`), then one for each group.
What is not proven is scaled to nothing, in words that say whether it harms, does nothing, or needs more text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from moe_svd_distill.algebra.figures import Measurement
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.evaluation.guard import ERRORS, Kind, Trial, TrialFigures, kept_sentence, kind_of, refusal
from moe_svd_distill.evaluation.uncertainty import kl_change
from moe_svd_distill.files.typed import as_json

Evaluate: TypeAlias = Callable[[Mapping[str, float]], Measurement]
"""Measures the student at one scale per group; must be the untouched student at 0."""

GLOBAL_SCALES = (0.125, 0.25, 0.5, 0.75, 1.0)
_SMALLEST_STEP = 1e-3  # of the untouched KL: what a group's scale must gain to be worth having
_ALONE = 0.5


@dataclass(frozen=True)
class ScaleDecision:
    """How much of an adapter is kept, and what that rests on.

    Attributes:
        scales: Group to the factor on its deltas; all 0 when nothing is to be kept.
        kind: Whether the adapter is kept, and if not, whether it harms, has no effect that counts, or is not proven;
            None where nothing was measured.
        decision: One or two sentences for the user.
        trials: Everything tried, in order; the first is the untouched student.
        tokens_needed: Search text that would settle what is not proven; None where that is no question of text.
        used_documents: Digests of the documents the adapter was made on, which an evaluation leaves out.
        used_groups: Their sources.
        beside: What else run.json says of it.
    """

    scales: Mapping[str, float]
    kind: Kind | None
    decision: str
    trials: tuple[TrialFigures, ...] = ()
    tokens_needed: int | None = None
    used_documents: tuple[str, ...] = ()
    used_groups: tuple[str, ...] = ()
    beside: Mapping[str, object] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """Whether anything is kept, proven to help."""
        return self.kind == "kept"

    @property
    def details(self) -> dict[str, object]:
        """What was tried, for run.json; nothing where nothing was."""
        tried = {"trials": list(map(as_json, self.trials)), "tokens_needed": self.tokens_needed} if self.trials else {}
        return {**tried, **self.beside}

    def as_dict(self) -> dict[str, object]:
        """For run.json, without what the adapter was made on."""
        return {**self.details, "scales": dict(self.scales), "kind": self.kind, "decision": self.decision}


def search_scale(
    evaluate: Evaluate,
    groups: Sequence[str],
    *,
    global_scales: Sequence[float] = GLOBAL_SCALES,
) -> ScaleDecision:
    """Search one scale for the whole adapter, then one for each group, and accept only what is proven.

    Args:
        evaluate: Measures the student at given scales; called up to 7 times and up to 3 times for each group.
        groups: The groups of the adapter.
        global_scales: Scales above 0 to try for everything together.

    Raises:
        BadDataError: A figure is not finite.
    """
    return _Search(evaluate, groups).run(sorted(global_scales))


class _Search:
    def __init__(self, evaluate: Evaluate, groups: Sequence[str]) -> None:
        self.evaluate, self.groups = evaluate, tuple(groups)
        self.known: dict[tuple[float, ...], Trial] = {}
        self.nothing = dict.fromkeys(self.groups, 0.0)
        self.untouched = self.measured(self.nothing)
        self.known[(0.0,) * len(self.groups)] = Trial(self.nothing, self.untouched, self.untouched)
        self.best: Trial | None = None

    def run(self, global_scales: Sequence[float]) -> ScaleDecision:
        self.search_globally(global_scales)
        if len(self.groups) > 1:
            if self.best is None:
                self.try_groups_alone()
            if self.best is not None:
                self.refine_groups(self.best)
        return self.verdict()

    def tried(self, scales: Mapping[str, float]) -> Trial:
        key = tuple(scales[group] for group in self.groups)
        if key not in self.known:
            self.known[key] = Trial(dict(scales), self.untouched, self.measured(scales))
        return self.known[key]

    def measured(self, scales: Mapping[str, float]) -> Measurement:
        found = self.evaluate(dict(scales))
        if not (np.isfinite(found.kl).all() and np.isfinite(found.cross_entropy).all()):
            named = ", ".join(f"{group} {scale:g}" for group, scale in scales.items())
            raise BadDataError(
                f"the figures at scale {named} are not finite, so nothing is known of the adapter",
                "Check both models, or train with a smaller rate or in a wider type",
            )
        return found

    def consider(self, tried: Trial) -> None:
        """Take a setting that is proven, if KL falls further there."""
        if self.best is None or tried.kl.fall > self.best.kl.fall:
            self.best = tried

    def search_globally(self, grid: Sequence[float]) -> None:
        """The best of the scales that are proven to help, from the smallest up to the first that is not.

        Between the one below the best and the one above it, proven or not, the lowest point of the parabola through
        the three is tried as well: what is kept has been proven by then, and this is proven like any other.
        """
        tried = self.descend(grid)
        falls = [trial.kl.falls(ERRORS) for trial in tried]
        proven = falls.index(False) if False in falls else len(falls)
        for trial in tried[:proven]:
            if trial.counts():
                self.consider(trial)
        if self.best is None:
            return
        place = tried.index(self.best)
        if place + 1 < len(tried):
            points = [0.0, *grid[len(grid) - len(tried) :]]
            heights = [0.0, *(-trial.kl.fall for trial in tried)]
            scale = _lowest(points[place : place + 3], heights[place : place + 3])
            between = self.tried(dict.fromkeys(self.groups, scale))
            if between.counts():
                self.consider(between)

    def descend(self, grid: Sequence[float]) -> list[Trial]:
        """From the largest scale down, until one and the next above it are proven and KL falls less far below.

        Smaller ones would be proven too and fall less far still: KL is nearly a parabola in the scale.

        Returns:
            What was tried, the smallest scale first.
        """
        tried: list[Trial] = []
        for scale in reversed(grid):
            tried.insert(0, self.tried(dict.fromkeys(self.groups, scale)))
            lower, *above = tried
            if above and lower.kl.fall < above[0].kl.fall and all(t.kl.falls(ERRORS) for t in tried):
                break
        return tried

    def try_groups_alone(self) -> None:
        """One harmful group may spoil the others: try each by itself, all together with a quarter of the chance."""
        for group in self.groups:
            tried = self.tried({**self.nothing, group: _ALONE})
            if tried.counts(tries=4 * len(self.groups)):
                self.consider(tried)

    def refine_groups(self, start: Trial) -> None:
        """For each group that acts: half its scale, and nothing if that helped, else half as much again."""
        scales = dict(start.scales)
        for group, scale in start.scales.items():
            if scale == 0.0:
                continue
            for tries in ((0.5, 0.0), (1.5,)):
                improved = False
                for factor in tries:
                    changed = {**scales, group: round(scale * factor, 3)}
                    if not self.improves(scales, changed):
                        break
                    scales, improved = changed, True
                if improved:
                    break
        refined = self.tried(scales)
        if refined.counts():
            self.consider(refined)

    def improves(self, scales: Mapping[str, float], changed: Mapping[str, float]) -> bool:
        """Whether a setting that differs in one group is better; differences within noise are left alone."""
        change = kl_change(self.tried(scales).after, self.tried(changed).after)
        return change.falls(1.0) and change.fall > _SMALLEST_STEP * change.before

    def verdict(self) -> ScaleDecision:
        trials = tuple(trial.figures for trial in self.known.values())
        if self.best is not None:
            return ScaleDecision(self.best.scales, "kept", kept_sentence(self.best), trials)
        tried = list(self.known.values())[1:]
        kind = kind_of(tried)
        decision, needed = refusal(kind, tried, int(self.untouched.tokens.sum()))
        return ScaleDecision(self.nothing, kind, decision, trials, needed)


def _lowest(points: Sequence[float], heights: Sequence[float]) -> float:
    """The lowest point of the parabola through three points; the middle one where there is none between them."""
    a, b, _ = np.polyfit(points, heights, 2)
    lowest = float(-b / (2 * a)) if a > 0 else points[1]
    return round(min(max(lowest, points[0]), points[2]), 3) or points[1]
