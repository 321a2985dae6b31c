"""Whether every targeted class of tensors has a pair wherever PEFT will look for one."""

from __future__ import annotations

from collections.abc import Mapping

from moe_svd_distill.adapter.targets import Target
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families import Carrier, Family, TensorRole

_ACTION = "Write the adapter again with a pair for every tensor of the class, zeros where nothing is changed"
_Places = dict[str, dict[int, set[int]]]


def check_coverage(family: Family, targets: Mapping[str, Target], layers: int) -> frozenset[int]:
    """Check that PEFT finds a pair for every module and parameter its configuration will name.

    A configuration names classes ("q_proj"), not tensors. A layer without a pair of a named class would load with a
    key missing, so the class must be complete in every layer that the adapter changes at all. Layers without any pair
    are left out of the configuration by name. Dense MLPs and mixture-of-experts MLPs are alternatives: a layer needs
    one of them.

    Args:
        family: The student's architecture.
        targets: Hub name to target, for every pair.
        layers: The student's decoder layers.

    Returns:
        The layers that have pairs.

    Raises:
        BadDataError: Naming the first hub tensor without a pair.
    """
    places: _Places = {}
    for name, target in targets.items():
        if target.layer is None:
            continue
        if target.layer >= layers:
            raise BadDataError(
                f"{name} is a pair of layer {target.layer}, but the student has only the layers 0 to {layers - 1}",
                "Leave the pair out: no loaded model uses that layer",
            )
        experts = places.setdefault(target.role.role, {}).setdefault(target.layer, set())
        if target.expert is not None:
            experts.add(target.expert)
    present = frozenset(layer for by_layer in places.values() for layer in by_layer)
    _check_layers(family, places, present)
    _check_experts(family, places)
    return present


def _is_dense(role: TensorRole) -> bool:
    return role.role.startswith("dense.")


def _is_sparse(role: TensorRole) -> bool:
    return role.role.startswith(("experts.", "shared.")) or role.role == "router"


def _check_layers(family: Family, places: _Places, layers: frozenset[int]) -> None:
    roles = [role for role in family.roles if role.role in places]
    dense = {layer for role in roles if _is_dense(role) for layer in places[role.role]}
    sparse = {layer for role in roles if _is_sparse(role) for layer in places[role.role]}
    if both := sorted(dense & sparse):
        raise BadDataError(
            f"layer {both[0]} has pairs of a dense MLP and of experts, expected one kind",
            "Check that the adapter belongs to this student",
        )
    # With both kinds targeted, each layer must have one. With one kind alone, the other layers may be of the other.
    fallback = set(layers) - dense - sparse if dense and sparse else set()
    for role in roles:
        if _is_dense(role):
            expected = dense
        elif _is_sparse(role):
            expected = sparse | fallback
        else:
            expected = set(layers)
        if missing := sorted(expected - places[role.role].keys()):
            expert = 0 if role.carrier is Carrier.FUSED_EXPERT else None
            raise BadDataError(f"{role.name(missing[0], expert)} has no LoRA pair, but other layers have", _ACTION)


def _check_experts(family: Family, places: _Places) -> None:
    roles = [role for role in family.roles if role.carrier is Carrier.FUSED_EXPERT and role.role in places]
    if not roles:
        return
    found = {role.role for role in roles}
    wanted = [role for role in family.roles if role.carrier is Carrier.FUSED_EXPERT]
    if len(found) < len(wanted):
        lacking = next(role for role in wanted if role.role not in found)
        raise BadDataError(
            f"the experts have no LoRA pairs of {lacking.name(0, 0).rsplit('.', 2)[1]}, expected all three projections",
            _ACTION,
        )
    count = 1 + max(expert for role in roles for experts in places[role.role].values() for expert in experts)
    for role in roles:
        for layer, experts in sorted(places[role.role].items()):
            if missing := sorted(set(range(count)) - experts):
                raise BadDataError(f"{role.name(layer, missing[0])} has no LoRA pair, but other experts have", _ACTION)
