"""What is asked for: one validated, frozen description of a run, from file, environment and command line.

Precedence: command line > environment (``MOE_SVD_DISTILL_<KEY>``) > recipe file > preset > defaults.
"""

from moe_svd_distill.recipe.loading import ENVIRONMENT_PREFIX, load_recipe, parse_recipe, recipe_yaml
from moe_svd_distill.recipe.model import DEFAULT_HEAD_RANK, Rank, Recipe
from moe_svd_distill.recipe.sections import ExpertSettings, TrainingRecipe

__all__ = [
    "DEFAULT_HEAD_RANK",
    "ENVIRONMENT_PREFIX",
    "ExpertSettings",
    "Rank",
    "Recipe",
    "TrainingRecipe",
    "load_recipe",
    "parse_recipe",
    "recipe_yaml",
]
