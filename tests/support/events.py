"""Listeners for tests: what a run tells, as lists."""

from __future__ import annotations

from collections.abc import Callable

from moe_svd_distill.execution.events import Event, Listener, Noted, StageReached


def notes_to(said: list[str]) -> Listener:
    """Keeps the notes."""

    def take(event: Event) -> None:
        if isinstance(event, Noted):
            said.append(event.text)

    return take


def stages_to(reached: Callable[[str, float | None], None]) -> Listener:
    """Passes on the stages."""

    def take(event: Event) -> None:
        if isinstance(event, StageReached):
            reached(event.name, event.fraction)

    return take
