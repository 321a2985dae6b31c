"""What is asked for: one validated, frozen description of a run, from file, environment and command line.

Precedence: command line > environment (``MOE_SVD_DISTILL_<KEY>``) > recipe file > defaults. A preset counts where it is
named, less than what is given beside it.
"""

from moe_svd_distill.recipe.loading import (
    ENVIRONMENT_PREFIX,
    as_recipe,
    load_recipe,
    parse_recipe,
    read_value,
    set_values,
)
from moe_svd_distill.recipe.model import DEFAULT_HEAD_RANK, Rank, Recipe
from moe_svd_distill.recipe.presets import PRESET_KEYS, PRESETS
from moe_svd_distill.recipe.sections import ExpertSettings, TrainingRecipe
from moe_svd_distill.recipe.text_source import TextSource, text_sources
from moe_svd_distill.recipe.writing import recipe_schema, recipe_yaml, supplied_values

__all__ = [
    "DEFAULT_HEAD_RANK",
    "ENVIRONMENT_PREFIX",
    "PRESETS",
    "PRESET_KEYS",
    "ExpertSettings",
    "Rank",
    "Recipe",
    "TextSource",
    "TrainingRecipe",
    "as_recipe",
    "load_recipe",
    "parse_recipe",
    "read_value",
    "recipe_schema",
    "recipe_yaml",
    "set_values",
    "supplied_values",
    "text_sources",
]
