"""adapter_config.json, made from the shapes in the adapter's header alone.

The "explicit" configuration: everything that transformers 5 holds as an ``nn.Linear`` of its own in ``target_modules``,
everything else (fused experts, routers, and the dense and shared MLPs of mixture-of-experts families) in
``target_parameters``. A head that is saved whole is in ``modules_to_save``. ``lora_alpha`` equals ``r``, and wherever a
rank differs both ``rank_pattern`` and ``alpha_pattern`` say so: the scale of every pair is exactly 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from moe_svd_distill.adapter.coverage import check_coverage
from moe_svd_distill.adapter.naming import EMBEDDING, HEAD
from moe_svd_distill.adapter.pair_shapes import PairShape, pair_shapes, whole_shapes
from moe_svd_distill.adapter.targets import Target, target_of
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.families import Carrier, Family
from moe_svd_distill.families.roles import LAYER


def build_configuration(
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    *,
    base_model: str,
    student_layers: int,
    tied_embeddings: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        shapes: Key of the adapter's tensor to its shape: A ``(r, in)``, B ``(out, r)``, a head saved whole ``(V, d)``.
        family: The student's architecture.
        base_model: The student, as a hub id or a folder.
        student_layers: The student's decoder layers. Every targeted class of tensors must have a pair in each of them
            (of the MLPs: in each layer of its kind), because PEFT gives the rest an adapter that no key fills.
        tied_embeddings: Whether the student's head is its embedding matrix.
        revision: The student's revision on the hub.

    Raises:
        BadDataError: The tensors cannot be one PEFT adapter of the family, and why.
    """
    pairs, whole = pair_shapes(shapes), whole_shapes(shapes)
    targets = {name: target_of(family, name) for name in pairs}
    if tied_embeddings:
        refuse_tied(targets, whole)
    present = check_coverage(family, targets, student_layers)
    # MLPs of one kind alone may stand in some layers only because the other layers are of the other kind.
    attends = any(target.layer is not None and target.role.role.startswith("attention.") for target in targets.values())
    by_layer = attends and len(present) < student_layers
    ranks = memory_ranks(pairs, targets)
    rank = _body_rank(pairs, targets)
    patterns = _patterns(targets.values(), ranks, rank)
    configuration: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": _entries(family, targets.values(), {Carrier.MODULE, Carrier.EMBEDDING}, by_layer),
        "target_parameters": _entries(family, targets.values(), {Carrier.PARAMETER, Carrier.FUSED_EXPERT}, by_layer),
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
    }
    if whole:
        configuration["modules_to_save"] = [target_of(family, name).role.target for name in whole]
    return configuration


def refuse_tied(hub_names: Iterable[str], whole: Collection[str] = ()) -> None:
    """Refuse pairs of the embeddings or the head where these are one matrix, unless the head is saved whole.

    PEFT merges such a pair into the shared matrix and so changes both, while unmerged it changes one. A head saved
    whole gets a matrix of its own, and then a pair of the embeddings stays with the embeddings (decision 9).

    Args:
        hub_names: The tensors with a pair.
        whole: The tensors that are saved whole.

    Raises:
        BadDataError: There is such a pair.
    """
    if HEAD in whole:
        return
    for name in hub_names:
        if name in (HEAD, EMBEDDING):
            raise BadDataError(
                f"{name} has a LoRA pair, but the student ties its head to its embeddings: merged by PEFT it would "
                "change both",
                "Save the head whole (modules_to_save), or leave embeddings and head out of the transfer",
            )


def memory_ranks(pairs: Mapping[str, PairShape], targets: Mapping[str, Target]) -> dict[str, int]:
    """The rank PEFT needs for each module and parameter, by its name in the loaded model.

    The factors of gate and up are stacked: A ``(r_gate + r_up, H)``, so their ranks add up.

    Raises:
        BadDataError: The experts of a layer have different ranks.
    """
    parts: dict[str, dict[str, int]] = {}
    for name, pair in pairs.items():
        target = targets[name]
        by_role = parts.setdefault(target.memory_name, {})
        if by_role.setdefault(target.role.role, pair.rank) != pair.rank:
            raise BadDataError(
                f"{name} has rank {pair.rank}, expected {by_role[target.role.role]} like the layer's other experts",
                "Zero-pad the experts of a layer to one rank",
            )
    return {memory_name: sum(by_role.values()) for memory_name, by_role in parts.items()}


def _body_rank(pairs: Mapping[str, PairShape], targets: Mapping[str, Target]) -> int:
    """The commonest rank of the decoder layers, the larger one if two are equally common."""
    body = Counter(pair.rank for name, pair in pairs.items() if targets[name].layer is not None)
    counts = body or Counter(pair.rank for pair in pairs.values())
    return max(counts, key=lambda rank: (counts[rank], rank))


def _entries(family: Family, targets: Iterable[Target], carriers: set[Carrier], by_layer: bool) -> list[str]:
    """The entries in the family's order, each once; full names where only some layers have pairs."""
    targets = list(targets)
    if by_layer:
        order = {role.role: place for place, role in enumerate(family.roles)}
        named = sorted(
            (target.layer is None, target.layer or 0, order[target.role.role], target.memory_name)
            for target in targets
            if target.role.carrier in carriers
        )
        return list(dict.fromkeys(name for *_, name in named))
    found = {target.role.role for target in targets if target.role.carrier in carriers}
    return list(dict.fromkeys(role.target for role in family.roles if role.role in found))


def _patterns(targets: Iterable[Target], ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Regular expressions of memory names to ranks, for all that differs from ``rank``.

    PEFT takes the first key that matches the end of the name after a dot; these keys never overlap, so their order
    does not matter. Where the layers of a class differ, a key lists its layers.
    """
    classes: dict[str, dict[int | None, int]] = {}
    for target in targets:
        classes.setdefault(target.role.target, {})[target.layer] = ranks[target.memory_name]
    full_names = {target.role.target: target.memory_name for target in targets}
    patterns: dict[str, int] = {}
    for entry, by_layer in classes.items():
        if None in by_layer:
            patterns |= {re.escape(full_names[entry]): r for r in by_layer.values() if r != rank}
        elif len(set(by_layer.values())) == 1:
            patterns |= {rf".*\.{re.escape(entry)}": r for r in set(by_layer.values()) if r != rank}
        else:
            patterns |= _layer_patterns(full_names[entry], by_layer, rank)
    return dict(sorted(patterns.items()))


def _layer_patterns(memory_name: str, by_layer: Mapping[int | None, int], rank: int) -> dict[str, int]:
    prefix = LAYER.partition("{layer}")[0]
    tail = memory_name.removeprefix(prefix).partition(".")[2]
    layers: dict[int, list[int]] = {}
    for layer, r in by_layer.items():
        if layer is not None and r != rank:
            layers.setdefault(r, []).append(layer)
    return {
        f"{re.escape(prefix)}(?:{'|'.join(map(str, sorted(numbers)))})\\.{re.escape(tail)}": r
        for r, numbers in layers.items()
    }
