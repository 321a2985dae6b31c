"""MoE-SVD-Distill: move what a large teacher LLM knows into a smaller student LLM, as a LoRA adapter with figures.

The verbs of the command line are functions here, imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_svd_distill.adapter.repair import rebuild_configuration
    from moe_svd_distill.adapter.verify import verify
    from moe_svd_distill.cli.progress import Monitor
    from moe_svd_distill.errors import DistillError
    from moe_svd_distill.evaluation.request import BenchmarkRequest
    from moe_svd_distill.execution.events import Listener
    from moe_svd_distill.pipeline.distill import Adapter, distill, load_adapter
    from moe_svd_distill.pipeline.evaluate import evaluate
    from moe_svd_distill.pipeline.inspect import inspect
    from moe_svd_distill.pipeline.merge import merge
    from moe_svd_distill.pipeline.plan import make_plan as plan
    from moe_svd_distill.pipeline.push import push
    from moe_svd_distill.pipeline.reproduce import reproduce
    from moe_svd_distill.recipe import Recipe, load_recipe, parse_recipe

    __version__: str

__all__ = [
    "Adapter",
    "BenchmarkRequest",
    "DistillError",
    "Listener",
    "Monitor",
    "Recipe",
    "__version__",
    "distill",
    "evaluate",
    "inspect",
    "load_adapter",
    "load_recipe",
    "merge",
    "parse_recipe",
    "plan",
    "push",
    "rebuild_configuration",
    "reproduce",
    "verify",
]

_HOMES = {
    "Adapter": "pipeline.distill",
    "DistillError": "errors",
    "Listener": "execution.events",
    "Monitor": "cli.progress",
    "distill": "pipeline.distill",
    "load_adapter": "pipeline.distill",
    "BenchmarkRequest": "evaluation.request",
    "evaluate": "pipeline.evaluate",
    "inspect": "pipeline.inspect",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
    "plan": "pipeline.plan:make_plan",
    "merge": "pipeline.merge",
    "push": "pipeline.push",
    "rebuild_configuration": "adapter.repair",
    "reproduce": "pipeline.reproduce",
    "verify": "adapter.verify",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("moe-svd-distill")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute or name)


def __dir__() -> list[str]:
    return __all__
