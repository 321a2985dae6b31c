"""The part of a recipe that decides the numbers of an adapter, and so belongs to a unit's identity."""

from __future__ import annotations

from dataclasses import dataclass

from moe_svd_distill.recipe import Recipe

ALGORITHM_VERSION = 1  # raise it whenever the numbers of an adapter change


@dataclass(frozen=True)
class TransferSettings:
    """See the fields of the same names in ``Recipe``."""

    interpolation: str
    projection: str
    alignment: str
    fingerprint: str
    clusters: int | str
    blend: str
    assignment: str
    norms: str
    delta_sparsity: float
    energy: float | None
    dtype: str
    nan: str
    seed: int


def transfer_settings(recipe: Recipe) -> TransferSettings:
    """Pick the fields out of a recipe."""
    return TransferSettings(
        interpolation=recipe.interpolation,
        projection=recipe.projection,
        alignment=recipe.alignment,
        fingerprint=recipe.experts.fingerprint,
        clusters=recipe.experts.clusters,
        blend=recipe.experts.blend,
        assignment=recipe.experts.assignment,
        norms=recipe.norms,
        delta_sparsity=recipe.delta_sparsity,
        energy=recipe.energy,
        dtype=recipe.dtype,
        nan=recipe.nan,
        seed=recipe.seed,
    )
