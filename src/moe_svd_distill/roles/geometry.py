"""What config.json says of a model's sizes, and whether the weights agree with it and are all there.

Sizes come from the shapes of the tensors where they say it, otherwise from config.json.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from moe_svd_distill.errors import BadDataError
from moe_svd_distill.roles.layout import Meaning

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
VOCABULARY = ("vocab_size",)
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "n_kv_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    *("top_k_experts", "num_selected_experts"),
)
# Where other layers have the second beside the first, a layer without it is not whole.
TOGETHER = (
    *(("attention.q", "attention.o"), ("attention.o", "attention.q"), ("attention.kv_a", "attention.kv_b")),
    *(("dense.up", "dense.down"), ("dense.down", "dense.up"), ("dense.down", "dense.gate")),
    *(("shared.down", "shared.gate"), ("shared.down", "shared.up"), ("experts.down", "router")),
)


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The part of config.json about the text model: nested in a multimodal wrapper's, or all of it."""
    nested = (config.get(key) for key in ("text_config", "llm_config", "language_config"))
    return next((part for part in nested if isinstance(part, Mapping)), config)


def declared(text: Mapping[str, object], keys: Iterable[str]) -> int:
    """The first whole number among the keys, or the first of a list with one for each layer; 0 without any."""
    for key in keys:
        value = text.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and value > 0:
            return value
    return 0


def agreed(text: Mapping[str, object], keys: tuple[str, ...], found: int, what: str) -> int:
    """A size that the tensors show, if config.json does not say otherwise.

    Raises:
        BadDataError: Every key that config.json has says something else.
    """
    given = {key: text[key] for key in keys if text.get(key) is not None}
    if found and given and found not in given.values():
        key, value = next(iter(given.items()))
        raise BadDataError(
            f"config.json: {key} is {value!r}, but {what} {found}", "Use the config.json that came with the model"
        )
    return found or declared(text, keys)


def is_tied(config: Mapping[str, object], head_stored: bool) -> bool:
    """Whether the head is the embedding matrix; where config.json does not say, it is if no head is stored."""
    for part in (config, text_config(config)):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    return not head_stored


def find_faults(
    meanings: Collection[Meaning], others: Collection[int | None], layers: int, text: Mapping[str, object]
) -> Iterator[str]:
    """What is missing, or contradicts the number of experts.

    Args:
        meanings: Everything with a role.
        others: Layers that have a tensor without one.
        layers: How many there must be.
        text: What config.json says of the text model.
    """
    present: dict[str, set[int]] = defaultdict(set)
    experts: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    rows: dict[int, int] = {}
    for m in meanings:
        if m.layer is not None:
            present[m.role].add(m.layer)
            if m.expert is not None:
                experts[m.layer][m.role].add(m.expert)
            if m.role == "router":
                rows[m.layer] = m.shape[0]
    seen = set(others).union(*present.values())
    yield from (f"layer {layer} is missing" for layer in range(layers) if layer not in seen)
    for one, other in TOGETHER:
        if present[one] & present[other]:
            lacking = sorted(present[one] - present[other])
            yield from (f"layer {layer} has no {other}, which other layers have beside {one}" for layer in lacking)
    given = {key: value for key in EXPERTS if type(value := text.get(key)) is int}
    for layer in sorted(present["experts.down"]):
        count = max(experts[layer]["experts.down"]) + 1
        if given and count not in given.values():
            if rows.get(layer) not in given.values():
                key, value = next(iter(given.items()))
                yield f"config.json: {key} is {value}, but layer {layer} has {count} experts"
            count = max(count, rows.get(layer, 0))
        for role, found in experts[layer].items():
            if left := set(range(count)) - found:
                yield f"layer {layer}: {role} of expert {min(left)} is missing"
