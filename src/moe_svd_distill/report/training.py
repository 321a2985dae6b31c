"""What the pages say about training, in words; everything in the record may be absent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from moe_svd_distill.report.facts import Record, number

_STAGES = ("auto", "zero", "weights", "calibrated", "weights+calibrated")
_ENDS = {
    "done": "all planned steps were done",
    "no more gain": "it was stopped early, because there was no more gain on calibration text",
    "diverged": "it was stopped because it diverged",
}


def training_note(record: Record) -> str:
    """How the refined stage trained, in a few sentences; empty for a run without it."""
    refinement = _part(record, "refinement")
    if not refinement:
        return ""
    return " ".join(
        part
        for part in (_done(refinement), _rate(refinement), _kept(refinement), f"It began with {beginning(record)}.")
        if part
    )


def beginning(record: Record) -> str:
    """What training began with."""
    before = [stage for stage in str(record.get("method") or "").split("+") if stage not in ("", "refined")]
    if before:
        return f"the adapter of the {' and '.join(before)} stage{'s' if len(before) > 1 else ''}"
    named = starting_adapter(record)
    return f"the adapter {named}" if named else "the untouched student"


def starting_adapter(record: Record) -> str:
    """Name of the adapter that the recipe began with; empty where it began with a stage or from zero."""
    start = str(_part(record, "recipe").get("start") or "auto")
    return "" if start in _STAGES else Path(start).name


def _done(refinement: Record) -> str:
    settings = _part(refinement, "settings")
    steps, curve = refinement.get("steps"), refinement.get("curve") or ()
    reached, seen = (curve[-1].get("step"), curve[-1].get("tokens")) if curve else (None, None)
    text = f"Trained on {refinement.get('trained_on_tokens') or 0:,} tokens"
    if settings.get("epochs"):
        text += f", {settings['epochs']:g} times over"
    if steps:
        text += f", in {steps:,} steps" if reached in (None, steps) else f", in {reached:,} of {steps:,} steps"
    if steps and reached and seen:  # a step takes whole sequences, which may be fewer tokens than the settings say
        text += f" of {seen // reached:,} tokens"
    seconds = refinement.get("training_seconds")
    if seconds:
        text += f", for {seconds:,.0f} seconds"
    ended = str(refinement.get("ended") or "")
    return f"{text}{_where(_part(refinement, 'placement'))}{f'; {_ENDS.get(ended, ended)}' if ended else ''}."


def _where(placement: Record) -> str:
    devices = Counter(str(device) for device in placement.get("devices") or ())
    if not devices:
        return ""
    named = ", ".join(f"{count} × {device}" if count > 1 else device for device, count in devices.items())
    return f", {'in memory' if placement.get('resident') else 'one layer in memory at a time'}, on {named}"


def _rate(refinement: Record) -> str:
    rate, trials = _part(refinement, "settings").get("rate"), refinement.get("rate_trials") or ()
    if not rate or not trials:
        return ""
    began = "where training began" if refinement.get("rate_tried_from_start") else "with the untouched student"
    return f"The learning rate, {rate:.2g}, was the best of {len(trials)} in short trials that began {began}."


def _kept(refinement: Record) -> str:
    curve, best = refinement.get("curve") or (), refinement.get("best")
    if not curve or not isinstance(best, int) or best >= len(curve):
        return ""
    before, after = (number(curve[place].get("kl")) for place in (0, best))
    if best == 0:
        return f"KL on calibration text was {before} before and never lower, so nothing of the training was kept."
    step = curve[best].get("step") or 0
    return f"KL on calibration text fell from {before} to {after} at step {step:,}, which was kept."


def _part(record: Record, key: str) -> dict[str, Any]:
    part = record.get(key)
    return dict(part) if isinstance(part, dict) else {}
