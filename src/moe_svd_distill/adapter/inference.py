"""A guess at the student's architecture from nothing but the names of the tensors an adapter changes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moe_svd_distill.adapter.targets import target_of
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families import Family
from moe_svd_distill.families.registry import families


@dataclass(frozen=True)
class Inference:
    """A guess and what it rests on.

    Attributes:
        family: The guessed architecture: the one with the fewest kinds of tensors that has all of those changed.
        layers: The number of decoder layers that the names show.
        statement: Both in one sentence, for the user.
    """

    family: Family
    layers: int
    statement: str


def infer_family(hub_names: Collection[str]) -> Inference:
    """Guess the family that an adapter's names belong to.

    Raises:
        BadDataError: No known family has all of the tensors.
    """
    for family in sorted(families().values(), key=lambda entry: (len(entry.roles), entry.model_type)):
        try:
            targets = [target_of(family, name) for name in hub_names]
        except BadDataError:
            continue
        layers = 1 + max((target.layer for target in targets if target.layer is not None), default=0)
        also = [entry.model_type for entry in families().values() if entry is not family and _fits(entry, hub_names)]
        others = f" (also possible: {', '.join(sorted(also))})" if also else ""
        statement = (
            f"no student was given: from the tensors' names it was taken for a {family.model_type} model{others} "
            + (f"of {layers} layers" if any(target.layer is not None for target in targets) else "of any depth")
        )
        return Inference(family, layers, statement)
    raise BadDataError(
        f"no known family has all of the changed tensors, of which {next(iter(hub_names), 'none')} is the first",
        "Give the student's folder",
    )


def _fits(family: Family, hub_names: Collection[str]) -> bool:
    try:
        return all(target_of(family, name) for name in hub_names)
    except BadDataError:
        return False
