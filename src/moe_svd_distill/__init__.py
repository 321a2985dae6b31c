"""MoE-SVD-Distill: move what a large teacher LLM knows into a smaller student LLM, as a LoRA adapter with figures.

The verbs of the command line are functions here, imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_svd_distill.adapter.merge import merge as merge
    from moe_svd_distill.adapter.repair import rebuild_configuration
    from moe_svd_distill.adapter.verify import verify as verify
    from moe_svd_distill.evaluation.request import BenchmarkRequest, EvaluationRequest
    from moe_svd_distill.pipeline.distill import Adapter, Listener, distill, load_adapter
    from moe_svd_distill.pipeline.evaluate import evaluate_adapter
    from moe_svd_distill.recipe import Recipe, load_recipe, parse_recipe

__all__ = [
    "Adapter",
    "BenchmarkRequest",
    "EvaluationRequest",
    "Listener",
    "Recipe",
    "distill",
    "evaluate_adapter",
    "load_adapter",
    "load_recipe",
    "merge",
    "parse_recipe",
    "rebuild_configuration",
    "verify",
]

_HOMES = {
    "Adapter": "pipeline.distill",
    "Listener": "pipeline.distill",
    "distill": "pipeline.distill",
    "load_adapter": "pipeline.distill",
    "BenchmarkRequest": "evaluation.request",
    "EvaluationRequest": "evaluation.request",
    "evaluate_adapter": "pipeline.evaluate",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
    "merge": "adapter.merge",
    "rebuild_configuration": "adapter.repair",
    "verify": "adapter.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
