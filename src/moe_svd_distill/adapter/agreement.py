"""Whether adapter_config.json and the adapter's tensors say the same, and the scale of each pair that follows.

Read as PEFT reads it: the first key of ``rank_pattern`` and of ``alpha_pattern`` that matches a name's end counts, and
the scale is alpha / rank. So a ``rank_pattern`` without its ``alpha_pattern`` silently scales the pair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from moe_svd_distill.adapter.configuration import memory_ranks
from moe_svd_distill.adapter.pair_shapes import PairShape
from moe_svd_distill.adapter.targets import Target, target_of
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families import Carrier, Family

_ACTION = "Make adapter_config.json again with adapter-config"
_UNSUPPORTED = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "ensure_weight_tying": (False, None),
    "exclude_modules": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
}


@dataclass(frozen=True)
class Agreement:
    """What a configuration means for the tensors.

    Attributes:
        targets: Hub name of each pair to its target.
        scales: Hub name of each pair to the factor of ``B @ A``.
    """

    targets: Mapping[str, Target]
    scales: Mapping[str, float]


def check_agreement(
    pairs: Mapping[str, PairShape],
    family: Family,
    configuration: Mapping[str, Any],
    whole: Collection[str] = (),
) -> Agreement:
    """Check that a configuration targets exactly these pairs with their ranks.

    Args:
        pairs: Hub name to pair, from the header.
        family: The student's architecture.
        configuration: The content of adapter_config.json.
        whole: Hub names of the tensors that are saved whole, from the header.

    Raises:
        BadDataError: A pair is not targeted or has another rank, a target has no pair, ``modules_to_save`` is not
            what is saved whole, or the configuration asks for something that plain pairs cannot do, such as DoRA.
    """
    check_saved_modules(configuration, whole)
    for option, plain in _UNSUPPORTED.items():
        if configuration.get(option, plain[0]) not in plain:
            raise BadDataError(
                f"adapter_config.json: {option} is {configuration[option]!r}, expected {plain[0]!r}", _ACTION
            )
    targets = {name: target_of(family, name) for name in pairs}
    ranks = memory_ranks(pairs, targets)
    modules, parameters = configuration.get("target_modules"), configuration.get("target_parameters")
    used: set[str] = set()
    scales = {}
    for name, pair in pairs.items():
        target = targets[name]
        module_name = name.removesuffix(".weight")
        parameter_name = target.memory_name if _is_parameter(target) else name  # a Linear's weight may be named too
        if entry := _entry_of(parameter_name, parameters):
            peft_name, found = parameter_name, ranks[target.memory_name]
        elif entry := _entry_of(module_name, modules):
            peft_name, found = module_name, pair.rank
        else:
            raise BadDataError(
                f"adapter_config.json targets nothing that {name} belongs to: PEFT would drop its pair", _ACTION
            )
        used.add(entry)
        rank, scales[name] = _rank_and_scale(configuration, peft_name)
        if rank != found:
            raise BadDataError(f"adapter_config.json gives {peft_name} rank {rank}, expected {found}", _ACTION)
    _refuse_unused(modules, parameters, used)
    return Agreement(targets, scales)


def check_saved_modules(configuration: Mapping[str, Any], whole: Collection[str]) -> None:
    """Check that ``modules_to_save`` names exactly what is saved whole.

    With a tensor saved whole and no entry for it, PEFT overwrites the base model's own weight without a word.

    Args:
        configuration: The content of adapter_config.json.
        whole: Hub names of the tensors that are saved whole.

    Raises:
        BadDataError: It names something else.
    """
    found = configuration.get("modules_to_save") or []
    expected = sorted(name.removesuffix(".weight") for name in whole)
    if isinstance(found, str) or sorted(map(str, found)) != expected:
        raise BadDataError(
            f"adapter_config.json: modules_to_save is {configuration.get('modules_to_save')!r}, expected "
            f"{expected or None!r}, which is what the adapter's file holds whole",
            _ACTION,
        )


def _is_parameter(target: Target) -> bool:
    return target.role.carrier in (Carrier.PARAMETER, Carrier.FUSED_EXPERT)


def _entry_of(name: str, entries: str | Collection[str] | None) -> str | None:
    """The entry that matches a name, as PEFT compares: the whole name, or its end after a dot; a string is a regex."""
    if isinstance(entries, str):
        return entries if entries == "all-linear" or re.fullmatch(entries, name) else None
    return next((entry for entry in entries or () if name == entry or name.endswith(f".{entry}")), None)


def _rank_and_scale(configuration: Mapping[str, Any], name: str) -> tuple[int, float]:
    try:
        rank = int(_matching(configuration.get("rank_pattern"), name, configuration["r"]))
        alpha = float(_matching(configuration.get("alpha_pattern"), name, configuration["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if configuration.get("use_rslora") else rank)
    except (KeyError, ValueError, TypeError, ZeroDivisionError, re.error) as error:
        raise BadDataError(f"adapter_config.json: no usable rank and alpha for {name}: {error!r}", _ACTION) from error
    return rank, scale


def _matching(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _refuse_unused(modules: Any, parameters: Any, used: Collection[str]) -> None:
    for entries in (modules, parameters):
        for entry in () if isinstance(entries, str) else entries or ():
            if entry not in used:
                raise BadDataError(f"adapter_config.json targets {entry!r}, for which there is no pair", _ACTION)
