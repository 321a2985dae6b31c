"""What is asked for: one validated, frozen description of a run, from file, environment and command line.

Precedence: command line > environment (``MOE_SVD_DISTILL_<KEY>``) > recipe file > preset > defaults.
"""

from moe_svd_distill.recipe.loading import (
    ENVIRONMENT_PREFIX,
    PRESETS,
    load_recipe,
    parse_recipe,
    recipe_yaml,
    supplied_values,
)
from moe_svd_distill.recipe.model import DEFAULT_HEAD_RANK, ExpertSettings, Rank, Recipe, TrainingRecipe
from moe_svd_distill.recipe.text_source import TextSource, text_sources

__all__ = [
    "DEFAULT_HEAD_RANK",
    "ENVIRONMENT_PREFIX",
    "PRESETS",
    "ExpertSettings",
    "Rank",
    "Recipe",
    "TextSource",
    "TrainingRecipe",
    "load_recipe",
    "parse_recipe",
    "recipe_yaml",
    "supplied_values",
    "text_sources",
]
