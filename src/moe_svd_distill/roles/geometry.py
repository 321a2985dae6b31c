"""The sizes of a model: from the shapes of its tensors where they say it, otherwise from config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_svd_distill.errors import BadDataError

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


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model; 0 where it has nothing of the kind.

    Attributes:
        neurons: Width of a dense MLP.
        experts: Routed experts of a mixture-of-experts layer, the most that a layer has.
        expert_neurons: Width of one routed expert.
        tied_embeddings: Whether the head is the embedding matrix.
    """

    layers: int
    hidden: int
    query_heads: int
    key_value_heads: int
    head_dimension: int
    vocabulary: int
    neurons: int
    experts: int
    experts_per_token: int
    expert_neurons: int
    tied_embeddings: bool


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json about the text model: nested in a multimodal wrapper's, or all of it."""
    nested = (config.get(key) for key in ("text_config", "llm_config", "language_config"))
    return next((part for part in nested if isinstance(part, Mapping)), config)


def declared(text: Mapping[str, Any], keys: Iterable[str]) -> int:
    """The first whole number among the keys, or the first of a list with one for each layer; 0 without any."""
    for key in keys:
        value = text.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and value > 0:
            return value
    return 0


def agreed(text: Mapping[str, Any], keys: tuple[str, ...], found: int, what: str) -> int:
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


def is_tied(config: Mapping[str, Any], head_stored: bool) -> bool:
    """Whether the head is the embedding matrix; where config.json does not say, it is if no head is stored."""
    for part in (config, text_config(config)):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    return not head_stored
