"""demo: the whole pipeline on the bundled pairs."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from moe_svd_distill.cli.options import json_option

PAIRS = ("sibling", "independent")
EVALUATION_TOKENS = 16_000
SCALE_SEARCH_TOKENS = 8_192
TOKENS = 8_192
COPIES = 3
PASSES = 4


@click.command("demo", short_help="The whole pipeline, no download.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option("--pair", "pairs", multiple=True, help="Lab pair; repeatable. Default: sibling and independent.")
@json_option
def command(output: Path, pairs: tuple[str, ...], as_json: bool) -> None:
    """Distil the bundled lab pairs, evaluate the adapters on held-out text, and show what they do.

    The sibling pair shares shape and lineage, so its weights carry over, and text refines them. The independent pair
    shares nothing but the tokenizer: there the head and the last layer are fitted to the teacher on a little text.
    """
    from moe_svd_distill.cli.commands.evaluate import show as show_figures
    from moe_svd_distill.cli.screen import Monitor, print_json
    from moe_svd_distill.cli.screen import output as screen
    from moe_svd_distill.pipeline.distill import Listener, distill
    from moe_svd_distill.pipeline.evaluate import EvaluationRequest, evaluate_adapter
    from moe_svd_distill.pipeline.lab import lab_pair
    from moe_svd_distill.recipe import parse_recipe

    results: dict[str, Any] = {}
    for name in pairs or PAIRS:
        started = time.monotonic()
        pair = lab_pair(name)
        recipe = parse_recipe(
            {
                "teacher": str(pair.teacher),
                "student": str(pair.student),
                "output": output / name,
                "calibration": [str(pair.calibration)],
                "scale_search_tokens": SCALE_SEARCH_TOKENS,
                "tokens": TOKENS,
                "copies": COPIES,
                "fit_passes": PASSES,
                "rank": 16,
            }
        )
        if not as_json:
            screen.print(f"\n[bold]{name}[/bold]: {pair.description}", soft_wrap=True, highlight=False)
        with Monitor(quiet=as_json) as monitor:
            adapter = distill(recipe, Listener(monitor.on_plan, monitor.on_event, monitor.on_stage, monitor.say))
            request = EvaluationRequest(adapter.folder, texts=(pair.heldout,), tokens=EVALUATION_TOKENS)
            evaluated = evaluate_adapter(request, partial(_show, monitor))
        decision = str(adapter.record["scale_search"]["decision"])
        results[name] = {
            "decision": decision,
            "evaluation": evaluated.evaluation,
            "report": str(evaluated.report),
            "seconds": round(time.monotonic() - started, 1),
        }
        if not as_json:
            show_figures(name, evaluated.evaluation)
            screen.print(f"Scale search: {decision}", soft_wrap=True, highlight=False)
            screen.print(f"Report: {evaluated.report}  ({results[name]['seconds']} s)", soft_wrap=True, highlight=False)
    if as_json:
        print_json(results)


def _show(monitor: Any, step: str, done: int, total: int) -> None:
    monitor.on_stage(step, done / total)
