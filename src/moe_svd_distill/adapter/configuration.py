"""adapter_config.json: what PEFT is told to change, in as few words as name exactly that.

``lora_alpha`` equals ``r``, and wherever a rank differs both ``rank_pattern`` and ``alpha_pattern`` say so: the scale
of every pair is exactly 1. A head that is saved whole is in ``modules_to_save``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from moe_svd_distill.adapter.keys import AdapterKeys, Target
from moe_svd_distill.adapter.peft_model import MAKE_AGAIN, lora_config
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.errors import BadDataError

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


class AdapterConfiguration(TypedDict):
    """adapter_config.json, as PEFT names its fields."""

    peft_type: str
    task_type: str
    base_model_name_or_path: str
    revision: None
    inference_mode: bool
    r: int
    lora_alpha: float
    lora_dropout: float
    bias: str
    use_rslora: bool
    use_dora: bool
    target_modules: list[str]
    target_parameters: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: NotRequired[list[str]]


def build_configuration(
    keys: AdapterKeys, ranks: Mapping[str, int], *, base_model: str, whole_head: bool = False
) -> AdapterConfiguration:
    """The content of adapter_config.json.

    Args:
        keys: What an adapter of the model can change.
        ranks: Parameter to the rank that PEFT needs for it, the head and the embeddings included.
        base_model: The student, as a hub id or a folder.
        whole_head: Whether the head is saved whole.

    Raises:
        BadDataError: A pair of tied embeddings, no pair at all, or a head with a bias that is to be saved whole.
    """
    architecture = keys.architecture
    targets = [keys.targets[name] for name in keys.targets if name in ranks]
    if not targets:
        raise BadDataError(
            "there is nothing to target, and PEFT loads no adapter without a LoRA pair",
            "Add pairs, of zeros if need be, or save the head as a pair of full rank",
        )
    refuse_tied(architecture, (name for target in targets for name in target.names), whole_head)
    if whole_head and getattr(architecture.head_slot.module, "bias", None) is not None:
        raise BadDataError(
            f"{architecture.head} has a bias beside it, which PEFT wants saved whole as well",
            "Save the head as a LoRA pair (of full rank if need be)",
        )
    modules, parameters = [name for name, _ in architecture.skeleton.model.named_modules()], architecture.skeleton.slots
    configuration = _configuration(targets, ranks, base_model)
    configuration["target_modules"] = short_names(configuration["target_modules"], modules)
    configuration["target_parameters"] = short_names(configuration["target_parameters"], parameters, least=2)
    if whole_head:
        configuration["modules_to_save"] = short_names([architecture.head_slot.name.rpartition(".")[0]], modules)
    return configuration


def peft_configuration(targets: Sequence[Target], rank_of: Callable[[str], int]) -> Any:
    """The configuration of some parameters as PEFT's object, with every name in full, from the ranks of matrices."""
    named = _configuration(targets, {target.parameter: target.rank(rank_of) for target in targets}, "")
    return lora_config({**named, "target_parameters": named["target_parameters"] or None})


def plain_configuration(
    ranks: Mapping[str, int], *, base_model: str, whole: Sequence[str] = (), every: Iterable[str] = ()
) -> AdapterConfiguration:
    """A configuration of modules alone, as transformers 4, vLLM and SGLang read adapters.

    These go by the last parts of names; PEFT puts a pair on every module that a name ends, so a name is longer where
    its last part is that of modules without a pair, too.

    Args:
        ranks: Module to the rank of its pair.
        base_model: The student, as a hub id or a folder.
        whole: Modules that are saved whole.
        every: All modules of the student, where it is at hand.
    """
    configuration = _fields((short_names(ranks, {*ranks, *every}), []), ranks, list(ranks.values()), base_model)
    if whole:
        configuration["modules_to_save"] = list(whole)
    return configuration


def refuse_tied(architecture: Architecture, names: Iterable[str], whole_head: bool = False) -> None:
    """Refuse pairs of the embeddings or the head where these are one matrix, unless the head is saved whole.

    PEFT merges such a pair into the shared matrix and so changes both, while unmerged it changes one. A head saved
    whole gets a matrix of its own, and then a pair of the embeddings stays with the embeddings (decision 9).

    Raises:
        BadDataError: There is such a pair.
    """
    if whole_head or not architecture.tied:
        return
    ends = (architecture.head, architecture.embedding)
    if found := next((name for name in names if name in ends), None):
        raise pair_of_tied(found)


def pair_of_tied(name: str) -> BadDataError:
    """The refusal of a pair of one of two matrices that are the same."""
    return BadDataError(
        f"{name} has a LoRA pair, but the student ties its head to its embeddings: merged by PEFT it would change both",
        "Save the head whole (modules_to_save), or leave embeddings and head out of the transfer",
    )


def refuse_incomplete(target: Target, ranks: Mapping[str, int]) -> None:
    """Refuse pairs for some of the matrices of a parameter only, or of ranks that differ from expert to expert.

    Raises:
        BadDataError: Naming the first matrix that is lacking or differs.
    """
    if lacking := next((name for name in target.names if name not in ranks), None):
        raise BadDataError(
            f"{lacking} has no LoRA pair, but others of {target.parameter} have",
            "Write the adapter again with a pair for every matrix of a parameter, zeros where nothing is changed",
        )
    expected: dict[int | None, int] = {}
    for matrix in target.matrices:
        rank = ranks[matrix.name]
        if expected.setdefault(matrix.piece.begin, rank) != rank:
            raise BadDataError(
                f"{matrix.name} has rank {rank}, expected {expected[matrix.piece.begin]} like the layer's others",
                "Zero-pad the experts of a layer to one rank",
            )


def check_options(fields: Mapping[str, object], whole: Collection[str]) -> None:
    """Refuse what an adapter_config.json asks for beyond plain pairs and the modules that the file holds whole.

    Raises:
        BadDataError: An option is not supported, or ``modules_to_save`` names something else.
    """
    for option, plain in _UNSUPPORTED.items():
        if fields.get(option, plain[0]) not in plain:
            raise BadDataError(
                f"adapter_config.json: {option} is {fields[option]!r}, expected {plain[0]!r}", MAKE_AGAIN
            )
    named = names_in(fields, "modules_to_save")
    matched = {(module, entry) for module in whole for entry in named if module.endswith(entry)}
    if {module for module, _ in matched} != set(whole) or {entry for _, entry in matched} != set(named):
        raise BadDataError(
            f"adapter_config.json: modules_to_save is {fields.get('modules_to_save')!r}, expected "
            f"{[module.rpartition('.')[2] for module in whole] or None}",
            MAKE_AGAIN,
        )


def names_in(fields: Mapping[str, object], key: str) -> list[str]:
    """The names in a list of adapter_config.json; none where it has no such list.

    Raises:
        BadDataError: Something else is there.
    """
    found = fields.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise BadDataError(f"adapter_config.json: {key} is {found!r}, expected a list of names", MAKE_AGAIN)
    return found


def short_names(wanted: Collection[str], every: Iterable[str], least: int = 1) -> list[str]:
    """The fewest and shortest endings that name exactly the wanted ones, in their order.

    Args:
        wanted: Full names with dots.
        every: All names that an ending could match.
        least: Parts of the shortest ending.
    """
    ending_of: dict[str, list[str]] = defaultdict(list)
    for name in every:
        parts = name.split(".")
        for count in range(least, len(parts) + 1):
            ending_of[".".join(parts[-count:])].append(name)
    kept = set(wanted)
    chosen: dict[str, None] = {}
    for name in wanted:
        parts = name.split(".")
        endings = (".".join(parts[-count:]) for count in range(min(least, len(parts)), len(parts) + 1))
        chosen[next((ending for ending in endings if kept.issuperset(ending_of[ending])), name)] = None
    return list(chosen)


def rank_and_scale(configuration: Mapping[str, object], name: str) -> tuple[int, float]:
    """Rank and scale that PEFT gives a module or parameter: the first pattern that matches the end of its name counts.

    Raises:
        BadDataError: There is no usable rank and alpha.
    """
    fields: Mapping[str, Any] = configuration
    try:
        rank = int(_matching(fields.get("rank_pattern"), name, fields["r"]))
        alpha = float(_matching(fields.get("alpha_pattern"), name, fields["lora_alpha"]))
        return rank, alpha / (rank**0.5 if fields.get("use_rslora") else rank)
    except (AttributeError, KeyError, ValueError, TypeError, ZeroDivisionError, re.error) as error:
        raise BadDataError(
            f"adapter_config.json: no usable rank and alpha for {name}: {error!r}",
            "Make adapter_config.json again with adapter-config",
        ) from error


def _configuration(targets: Sequence[Target], ranks: Mapping[str, int], base_model: str) -> AdapterConfiguration:
    by_entry = {target.entry: ranks[target.parameter] for target in targets}
    inside = [ranks[target.parameter] for target in targets if target.matrices]
    modules = [target.entry for target in targets if not target.as_parameter]
    parameters = [target.entry for target in targets if target.as_parameter]
    return _fields((modules, parameters), by_entry, inside or list(by_entry.values()), base_model)


def _fields(
    changed: tuple[list[str], list[str]], ranks: Mapping[str, int], counted: Sequence[int], base_model: str
) -> AdapterConfiguration:
    """The configuration, with the commonest of the counted ranks as the one that holds where nothing else is said."""
    counts = Counter(counted)
    rank = max(counts, key=lambda rank: (counts[rank], rank))
    patterns = _patterns(ranks, rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": changed[0],
        "target_parameters": changed[1],
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
    }


def _patterns(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Regular expressions of name endings to ranks, for all that differs from ``rank``; no two match one name."""
    patterns: dict[str, int] = {}
    for other in sorted(set(ranks.values()) - {rank}):
        names = [name for name, found in ranks.items() if found == other]
        patterns |= {re.escape(ending): other for ending in short_names(names, ranks, least=2)}
    return dict(sorted(patterns.items()))


def _matching(patterns: Any, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
