"""A run that kills itself: ``python -m tests.support.killed RECIPE STEP FRACTION`` dies by SIGKILL in a step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from moe_svd_distill.pipeline.distill import distill
from moe_svd_distill.recipe import load_recipe
from tests.support.events import stages_to
from tests.support.passes import a_journal_of_every_layer


def main() -> None:
    """Run the recipe until the step has got that far."""
    file, step, limit = sys.argv[1:]

    def on_stage(name: str, fraction: float | None) -> None:
        if name == step and fraction is not None and fraction >= float(limit):
            os.kill(os.getpid(), signal.SIGKILL)

    with a_journal_of_every_layer():
        distill(load_recipe(Path(file), {}), stages_to(on_stage))


if __name__ == "__main__":
    main()
