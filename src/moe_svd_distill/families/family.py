"""What the tensors of an architecture mean: the declarative vocabulary every family is written in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from moe_svd_distill.errors import BadDataError


class Axis(StrEnum):
    """What the rows or the columns of a tensor are indexed by."""

    RESIDUAL = "residual"
    QUERY_HEADS = "query heads"
    KEY_VALUE_HEADS = "key-value heads"
    HEAD_DIMENSION = "head dimension"
    NEURONS = "neurons"
    EXPERTS = "experts"
    VOCABULARY = "vocabulary"


class Carrier(StrEnum):
    """How a PEFT adapter can carry a change of the tensor."""

    MODULE = "target_modules"
    PARAMETER = "target_parameters"
    FUSED_EXPERT = "target_parameters, fused over experts"
    EMBEDDING = "embedding"
    NONE = "none"


@dataclass(frozen=True)
class TensorRole:
    """One kind of tensor of a family.

    Attributes:
        role: Its meaning, shared by all families, for example ``attention.q`` or ``experts.up``.
        template: Its name in the hub checkpoint, with ``{layer}`` and ``{expert}`` where they apply.
        axes: What its rows (and columns) are indexed by.
        carrier: How an adapter can carry its change; ``Carrier.NONE`` for norms, biases and buffers.
        target: The entry of ``target_modules`` or ``target_parameters`` that PEFT needs for it.
        norm: The role of the norm whose gain multiplies this tensor's input, if there is one.
        optional: Whether a checkpoint of the family may lack it.
    """

    role: str
    template: str
    axes: tuple[Axis, ...]
    carrier: Carrier = Carrier.NONE
    target: str = ""
    norm: str | None = None
    optional: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The template as a regular expression with the groups ``layer`` and ``expert``."""
        escaped = re.escape(self.template)
        escaped = escaped.replace(re.escape("{layer}"), r"(?P<layer>\d+)")
        return re.compile(escaped.replace(re.escape("{expert}"), r"(?P<expert>\d+)") + r"\Z")

    def name(self, layer: int | None = None, expert: int | None = None) -> str:
        """The tensor's hub name at a layer and, for experts, an expert."""
        return self.template.format(layer=layer, expert=expert)


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model, read from its config.json and never typed in.

    Attributes:
        experts: Routed experts of a mixture-of-experts layer; 0 for a dense model.
        neurons: Width of a dense MLP.
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


@dataclass(frozen=True)
class Family:
    """One architecture: what its tensors mean and where its sizes stand in config.json.

    Attributes:
        model_type: The ``model_type`` of config.json.
        roles: Every kind of tensor.
        ignored: Regular expressions of tensors that no loaded model uses, with the reason.
        experts_keys: config.json keys that may hold the number of routed experts, in order of preference.
        expert_neurons_keys: The same for the width of one expert.
    """

    model_type: str
    roles: tuple[TensorRole, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    experts_keys: tuple[str, ...] = ()
    expert_neurons_keys: tuple[str, ...] = ()

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """Read the sizes.

        Raises:
            BadDataError: A size is missing, not an integer, or not positive.
        """
        heads = _size(config, "num_attention_heads")
        hidden = _size(config, "hidden_size")
        head_dimension = config.get("head_dim") or hidden // heads
        moe = bool(self.experts_keys)
        return Geometry(
            layers=_size(config, "num_hidden_layers"),
            hidden=hidden,
            query_heads=heads,
            key_value_heads=_size(config, "num_key_value_heads", default=heads),
            head_dimension=int(head_dimension),
            vocabulary=_size(config, "vocab_size"),
            neurons=_size(config, "intermediate_size"),
            experts=_size(config, *self.experts_keys) if moe else 0,
            experts_per_token=_size(config, "num_experts_per_tok", default=1) if moe else 0,
            expert_neurons=_size(config, *self.expert_neurons_keys) if moe else 0,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    def role(self, role: str) -> TensorRole:
        """The entry of a role.

        Raises:
            KeyError: The family has no such role.
        """
        return self._by_role[role]

    def has_role(self, role: str) -> bool:
        """Whether the family knows the role."""
        return role in self._by_role

    @cached_property
    def _by_role(self) -> dict[str, TensorRole]:
        return {entry.role: entry for entry in self.roles}


def _size(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise BadDataError(f"config.json: {key} is {value!r}, expected a positive integer", "Repair config.json")
    if default is not None:
        return default
    raise BadDataError(f"config.json has no {' or '.join(keys)}", "Use the config.json that came with the model")
