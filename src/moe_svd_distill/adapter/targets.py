"""Where a pair lands in the model that transformers builds: the module or the parameter that PEFT has to target."""

from __future__ import annotations

from dataclasses import dataclass

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families import Carrier, Family, TensorRole
from moe_svd_distill.families.roles import LAYER


@dataclass(frozen=True)
class Target:
    """What the pair of one hub tensor is for PEFT.

    Attributes:
        role: The tensor's entry in the family.
        layer: Decoder layer, or None.
        expert: Routed expert, or None.
        memory_name: The full name that PEFT matches patterns against: of the module for ``target_modules``, of the
            parameter for ``target_parameters``. All experts of a layer share one.
    """

    role: TensorRole
    layer: int | None
    expert: int | None
    memory_name: str


def target_of(family: Family, hub_name: str) -> Target:
    """Find what a pair changes.

    Raises:
        BadDataError: The family has no such tensor, or no adapter can carry its change.
    """
    for role in family.roles:
        match = role.pattern.match(hub_name)
        if match is None:
            continue
        if role.carrier is Carrier.NONE:
            raise BadDataError(f"{hub_name}: no LoRA pair can carry a change of it", "Leave the pair out")
        groups = match.groupdict()
        layer, expert = groups.get("layer"), groups.get("expert")
        return Target(
            role,
            None if layer is None else int(layer),
            None if expert is None else int(expert),
            _memory_name(role, hub_name, layer),
        )
    raise BadDataError(
        f"{hub_name}: a {family.model_type} model has no such tensor", "Check that the adapter belongs to this student"
    )


def _memory_name(role: TensorRole, hub_name: str, layer: str | None) -> str:
    if role.carrier is Carrier.PARAMETER:
        return LAYER.format(layer=layer) + role.target
    if role.carrier is Carrier.FUSED_EXPERT:
        return f"{LAYER.format(layer=layer)}mlp.{role.target}"
    return hub_name.removesuffix(".weight")
